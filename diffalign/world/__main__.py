"""Prints the captions of a split, one a line:  python -m diffalign.world heldout > assets/world/heldout.txt"""

import argparse

from diffalign.world.captions import prompts, splits

parser = argparse.ArgumentParser(description="Print the captions of a split of the embedded world, one a line.")
parser.add_argument("split", choices=list(splits()))
print("\n".join(prompts(parser.parse_args().split)))
