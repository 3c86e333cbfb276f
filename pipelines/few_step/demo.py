"""A four-call student of the embedded model at work: text to image, image to image and inpainting, on one sheet.

    python pipelines/few_step/demo.py --output outputs/few_step

The model and the student are those in this repository unless ``--model`` and ``--lora`` name others.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

HERE = Path(__file__).parent
ASSETS = HERE.parent.parent / "diffx" / "assets"


def sheet(rows: list[list[Image.Image]], side: int = 96, gap: int = 4) -> Image.Image:
    """Pictures in rows, with white between them."""
    made = Image.new("RGB", (max(map(len, rows)) * (side + gap) - gap, len(rows) * (side + gap) - gap), "white")
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            made.paste(image.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (c * (side + gap), r * (side + gap)))
    return made


def main(args: argparse.Namespace) -> None:
    pipe = DiffusionPipeline.from_pretrained(args.model, custom_pipeline=str(HERE), trust_remote_code=True)
    pipe.load_lora_weights(args.lora)
    pipe.scheduler = DDIMScheduler.from_pretrained(args.lora, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt: str, *pictures: Image.Image, **options) -> Image.Image:
        return pipe(prompt, *pictures, generator=torch.Generator().manual_seed(args.seed), **options).images[0]

    text = [draw(prompt) for prompt in ("rocket", "ghost on pink", "red apple", "cat face on blue", "sunflower on yellow")]
    rocket, apple = text[0], text[2]
    changed = [draw("rocket on yellow", rocket, num_inference_steps=n, strength=n / 4) for n in (1, 2, 3, 4)]
    left_half = Image.new("L", rocket.size, 0)
    left_half.paste(255, (0, 0, rocket.width // 2, rocket.height))
    filled = [draw(prompt, apple, left_half) for prompt in ("green apple", "tomato", "red apple on blue")]
    args.output.mkdir(parents=True, exist_ok=True)
    sheet([text, [rocket, *changed], [apple, left_half, *filled]]).save(args.output / "few_step.png")
    print(f"pictures: {args.output / 'few_step.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "emoji"))
    parser.add_argument("--lora", default=str(ASSETS / "emoji_progressive_4"), help="a folder or Hub id with LoRA weights and scheduler/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/few_step"))
    main(parser.parse_args())
