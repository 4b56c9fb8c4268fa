"""Networks: loading base models, encoding pictures and prompts, tuning (LoRA or full), the reference, and saving.

Nothing is imported here: `diffalign.models.<file>` brings in diffusers, transformers or peft when it needs them.

    base        load_base: a diffusers folder, a Hub id or a single .safetensors file -> Base
    family      what SD and SDXL do differently (sd, sdxl)
    encoder     pictures -> latent moments, prompts -> embeddings
    lora        adapters on peft, in the diffusers file layout
    reference   what the policy is compared with: LoRA switched off, or a frozen copy
    networks    policy and reference as the engine sees them
    attention   which kernel computes attention
    memory      gradient checkpointing, frozen weights in the autocast dtype
    saving      tuned weights on disk, and pipelines for generation
"""
