"""A picture inverted with the prompt that describes it, drawn again, and edited by other prompts: one row.

    python pipelines/latent_interpolation/edit_demo.py --output outputs/edits

The model is the one in this repository unless ``--model`` names another Stable Diffusion folder or Hub id.
"""

import argparse
from pathlib import Path

from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

HERE = Path(__file__).parent
EMBEDDED = HERE.parent.parent / "diffx" / "assets" / "emoji"


def main(args: argparse.Namespace) -> None:
    pipe = DiffusionPipeline.from_pretrained(args.model, custom_pipeline=str(HERE), trust_remote_code=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False, thresholding=False)
    picture = Image.open(args.picture).convert("RGB")
    options = {"source_prompt": args.source_prompt, "num_inference_steps": args.num_inference_steps}
    row = [picture, pipe.decode(pipe.encode(picture)), pipe.edit(picture, args.source_prompt, **options)]
    row += [pipe.edit(picture, prompt, guidance_scale=args.guidance_scale, strength=args.strength, **options) for prompt in args.prompt]
    side, gap = max(96, picture.height), 4
    sheet = Image.new("RGB", (len(row) * (side + gap) - gap, side), "white")
    for i, image in enumerate(row):
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (i * (side + gap), 0))
    args.output.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output / "edits.png")
    print(f"given, through the autoencoder, inverted and drawn again, then {args.prompt}: {args.output / 'edits.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED))
    parser.add_argument("--picture", default=str(HERE / "picture.png"))
    parser.add_argument("--source-prompt", default="green apple", help="what the picture shows")
    parser.add_argument("--prompt", nargs="+", default=["green apple on blue", "red apple on pink", "tomato"], help="of each edit")
    parser.add_argument("--strength", type=float, default=0.7)
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="of the edits; the inversion has none")
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("outputs/edits"))
    main(parser.parse_args())
