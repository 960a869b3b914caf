"""Save small autoencoders in diffusers format, for the tests of pairs."""

from pathlib import Path


def save_kl(folder: Path) -> Path:
    """Save a small `AutoencoderKL` with random weights. Latents have 1/4 of width and height."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = 3 * ("DownEncoderBlock2D",), 3 * ("UpDecoderBlock2D",)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4), down_block_types=kinds[0], up_block_types=kinds[1],
        latent_channels=4, norm_num_groups=2, layers_per_block=1, sample_size=32,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return folder


def save_plain(folder: Path) -> Path:
    """Save an `AutoencoderTiny` that returns nearly the same image, like a well-trained decoder."""
    import torch
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        encoder_block_out_channels=(4,), decoder_block_out_channels=(4,), num_encoder_blocks=(1,),
        num_decoder_blocks=(1,), latent_channels=4,
    )  # fmt: skip
    with torch.no_grad():
        for name, value in vae.named_parameters():
            value.zero_()
            if value.ndim == 4 and ".conv." not in name:
                for channel in range(3):
                    value[channel, channel, 1, 1] = 1
    vae.save_pretrained(folder)
    return folder
