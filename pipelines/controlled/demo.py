"""Soft inpainting and outpainting with the embedded model, on one sheet.

    python pipelines/controlled/demo.py --output outputs/controlled

The model is the one in this repository unless ``--model`` names another Stable Diffusion folder or Hub id.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

HERE = Path(__file__).parent
EMBEDDED = HERE.parent.parent / "diffx" / "assets" / "emoji"


def main(args: argparse.Namespace) -> None:
    pipe = DiffusionPipeline.from_pretrained(args.model, custom_pipeline=str(HERE), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": 3.0}

    def seeded() -> dict:
        return options | {"generator": torch.Generator().manual_seed(args.seed)}

    apple, rocket = (pipe(prompt, **seeded()).images[0] for prompt in ("red apple", "rocket on blue"))
    width, height = apple.size
    slope = Image.linear_gradient("L").rotate(90).resize(apple.size)  # black on the left, white on the right
    half = slope.point(lambda grey: 255 * (grey > 127))
    rows = [
        [apple, half, pipe("green apple", apple, half, **seeded()).images[0]],
        [apple, slope, pipe("green apple", apple, slope, **seeded()).images[0]],
    ]
    for feather in (0, 8):
        part = rocket.crop((0, 0, width // 2, height))
        shown = Image.new("RGB", apple.size, "white")
        shown.paste(part, (0, 0))
        made = pipe.outpaint("rocket on blue", part, right=width // 2, feather=feather, **seeded()).images[0]
        rows[feather // 8] += [shown, made]
    side, gap = 96, 4
    sheet = Image.new("RGB", (5 * (side + gap) - gap, 2 * (side + gap) - gap), "white")
    for i, image in enumerate(image for row in rows for image in row):
        sheet.paste(image.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (i % 5 * (side + gap), i // 5 * (side + gap)))
    args.output.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output / "controlled.png")
    print(f"pictures: {args.output / 'controlled.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED))
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/controlled"))
    main(parser.parse_args())
