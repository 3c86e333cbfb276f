"""Students beside samplers: they bring weights, steps and guidance of their own, and leave nothing behind."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

from diffx.evaluation import compare, evaluate
from diffx.evaluation.candidate import make_candidate
from diffx.families import remade
from diffx.loading import CALL_KWARGS, load_pipeline

CALLED = {"num_inference_steps": 2, "guidance_scale": 1.0}
PROMPTS = ["rocket", "ghost on pink"]


@pytest.fixture(scope="module")
def pipe():
    made = load_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def students(pipe, tmp_path_factory):
    """{"adapters", "whole"}: the embedded model, changed at random, in the two forms that are exported."""
    folder = tmp_path_factory.mktemp("students")
    torch.manual_seed(0)
    changed = load_pipeline()
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), changed.unet)
    for form in ("adapters", "whole"):
        at = folder / form
        scheduler.save_pretrained(at / "scheduler")
        if form == "adapters":
            StableDiffusionPipeline.save_lora_weights(at, unet_lora_layers=get_peft_model_state_dict(changed.unet))
        else:
            other = load_pipeline()
            with torch.no_grad():
                other.unet.conv_out.weight.mul_(1.5)
            remade(other, scheduler=scheduler).save_pretrained(at)
        (at / CALL_KWARGS).write_text(json.dumps(CALLED))
    return {"adapters": str(folder / "adapters"), "whole": str(folder / "whole")}


def pictures(pipe, **options):
    options = CALLED | dict(output_type="pt") | options
    return pipe(["rocket"], generator=torch.Generator().manual_seed(0), **options).images


def by_its_user(pipe, form, folder):
    """The student as Diffusers' own user loads it."""
    if form == "whole":
        loaded = DiffusionPipeline.from_pretrained(folder)
    else:
        loaded = load_pipeline()
        loaded.load_lora_weights(folder)
        loaded.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize("form", ["adapters", "whole"])
def test_a_student_samples_as_its_user_does_and_the_pipeline_is_as_before(pipe, students, form):
    before, unet, scheduler, names = pictures(pipe), pipe.unet, pipe.scheduler, list(pipe.unet.state_dict())
    with make_candidate(students[form], pipe).in_place(pipe):
        found = pictures(pipe)
    assert torch.equal(found, pictures(by_its_user(pipe, form, students[form]))) and not torch.equal(found, before)
    assert torch.equal(pictures(pipe), before)
    assert pipe.unet is unet and pipe.scheduler is scheduler and list(pipe.unet.state_dict()) == names


def test_it_is_compared_at_its_own_steps_and_guidance(pipe, students):
    words = ["UniPC", students["adapters"], students["whole"]]
    found = compare(pipe, words, num_inference_steps=(3,), prompts=PROMPTS, reference_steps=4, progress=False)
    rows = {row.sampler: row for row in found.rows if row.role == "sampler"}
    assert [rows[word].nfe for word in words] == [3, 2, 2]
    assert [rows[word].batch_factor for word in words] == [2, 1, 1]  # guided pairs, and students called without guidance
    assert f"{students['adapters']}, {students['whole']}: guidance is in the weights" in found.markdown()


def test_it_is_evaluated_at_its_own_steps_beside_others_at_theirs(pipe, students):
    words, measured = ["UniPC@3", "DDIM", students["adapters"]], dict(num_images=6, measures=("KID",))
    found = evaluate(pipe, samplers=words, num_inference_steps=(1, 2), progress=False, **measured)
    runs = [(row.sampler, row.num_inference_steps, row.nfe) for row in found.rows[1:]]
    assert runs == [("UniPC", 3, 3), ("DDIM", 1, 1), ("DDIM", 2, 2), (students["adapters"], 2, 2)]


def test_what_cannot_be_is_refused_by_name(pipe, students, tmp_path):
    with pytest.raises(ValueError, match=r"was made for 2 steps alone, asked were 8; leave out '@8'"):
        compare(pipe, [students["adapters"] + "@8"], prompts=PROMPTS)
    with pytest.raises(ValueError, match="listed twice at 2 steps"):
        compare(pipe, [students["adapters"]] * 2, prompts=PROMPTS)
    with pytest.raises(ValueError, match="was made for few steps; use a sampler that takes 100"):
        compare(pipe, ["UniPC"], prompts=PROMPTS, reference=students["adapters"])
    pipe.load_lora_weights(students["adapters"])
    try:
        with pytest.raises(ValueError, match="made of adapters, and the pipeline has adapters of its own; give one without"):
            make_candidate(students["adapters"], pipe)
    finally:
        pipe.unload_lora_weights()
    shutil.copytree(students["whole"], tmp_path / "other")
    index = json.loads((tmp_path / "other" / "model_index.json").read_text())
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(ValueError, match="is a student in a StableDiffusionXLPipeline, the model is a StableDiffusionPipeline"):
        make_candidate(str(tmp_path / "other"), pipe)
