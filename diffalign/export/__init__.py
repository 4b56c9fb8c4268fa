"""Tuned weights as files of other programs: ComfyUI, A1111 and its forks, kohya's sd-scripts.

tuned_run     the tuned weights that are exported, and the base that they belong to
names         modules in the naming of the original releases
layout        whole models in it, tensor by tensor
kohya         a LoRA in kohya's layout
single_file   a full model in one file
files         safetensors files written one tensor at a time
"""
