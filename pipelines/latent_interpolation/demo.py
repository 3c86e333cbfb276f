"""Pictures between two prompts and two noises: a grid and a GIF.

    python pipelines/latent_interpolation/demo.py --output outputs/interpolation

The model is the one in this repository unless ``--model`` names another Stable Diffusion folder or Hub id.
"""

import argparse
from pathlib import Path

from diffusers import DiffusionPipeline, UniPCMultistepScheduler

HERE = Path(__file__).parent
EMBEDDED = HERE.parent.parent / "diffx" / "assets" / "emoji"


def main(args: argparse.Namespace) -> None:
    pipe = DiffusionPipeline.from_pretrained(args.model, custom_pipeline=str(HERE), trust_remote_code=True)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        args.prompt, seed=args.seed, num_rows=args.num_rows, num_columns=args.num_columns,
        num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale,
    )  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    scale = max(1, 128 // drawn.images[0].width)
    drawn.grid(scale).save(args.output / "grid.png")
    drawn.save_gif(args.output / "loop.gif", scale=scale)
    print(f"pictures: {args.output / 'grid.png'}, {args.output / 'loop.gif'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED))
    parser.add_argument("--prompt", nargs=2, default=["red apple", "rocket on blue"], help="of the first and of the last row")
    parser.add_argument("--seed", nargs=2, type=int, default=[0, 1], help="of the first and of the last column")
    parser.add_argument("--num-rows", type=int, default=5)
    parser.add_argument("--num-columns", type=int, default=7)
    parser.add_argument("--num-inference-steps", type=int, default=12)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--output", type=Path, default=Path("outputs/interpolation"))
    main(parser.parse_args())
