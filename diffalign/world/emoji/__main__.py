"""Prints the captions of a split, one a line:  python -m diffalign.world.emoji heldout > assets/emoji/heldout.txt"""

import argparse

from diffalign.world.emoji.captions import SPLITS, prompts

parser = argparse.ArgumentParser(description="Print the captions of a split of the emoji world, one a line.")
parser.add_argument("split", choices=SPLITS)
print("\n".join(prompts(parser.parse_args().split)))
