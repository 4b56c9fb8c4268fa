"""The usable pairs of a data set, with prompts, scores, users and the reasons for what is left out."""
