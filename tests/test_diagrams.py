"""The engine and a layer as diagrams: every part is there, the numbers add up, and nothing lies on a word."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from matplotlib.text import Annotation

from minillm.costs import LLAMA_2_7B
from minillm.model import ModelConfig
from minillm.viz import EngineDiagram, LayerDiagram, PictureError
from minillm.viz.base import drawing_style
from minillm.viz.diagrams import ARROWS, PARTS

LLAMA_2_70B = replace(LLAMA_2_7B, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80)
LLAMA_2_70B = replace(LLAMA_2_70B, num_attention_heads=64, num_key_value_heads=8)
SMALL = ModelConfig(
    vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=2, max_position_embeddings=9, tie_word_embeddings=True, qkv_bias=True,
    mlp_bias=True, attention_out_bias=True, qk_norm=True,
)  # fmt: skip
CONFIGS = {"7B": LLAMA_2_7B, "70B": LLAMA_2_70B, "small": SMALL, "untied": replace(SMALL, tie_word_embeddings=False)}
PICTURES = {
    "engine": lambda: EngineDiagram(title="The engine"),
    "engine, cache": lambda: EngineDiagram("cache"),
    "engine, attention": lambda: EngineDiagram("attention"),
    "layer, 7B": lambda: LayerDiagram(LLAMA_2_7B, title="A layer"),
    "layer, 70B": lambda: LayerDiagram(LLAMA_2_70B),
    "layer, small": lambda: LayerDiagram(SMALL),
}


@pytest.mark.parametrize("name", PICTURES)
def test_same_data_same_bytes_and_no_blanks_at_the_end(name):
    picture = PICTURES[name]()
    assert picture.svg() == PICTURES[name]().svg() and picture.alt() and "\n" not in picture.alt()
    assert picture.text() == picture.text().rstrip()
    assert all(line == line.rstrip() for line in picture.text().splitlines())
    assert picture.figure().get_size_inches()[0] <= 9


@pytest.mark.parametrize("name", PICTURES)
def test_no_word_lies_on_another_and_no_arrow_goes_through_one(name):
    with drawing_style():
        figure = PICTURES[name]().figure()
        figure.canvas.draw()
    (axes,) = figure.axes
    words = [each for each in axes.texts if each.get_text()]
    extents = {each.get_text() + str(place): each.get_window_extent() for place, each in enumerate(words)}
    assert [word for word, box in extents.items() if box.x0 < 0 or box.x1 > figure.bbox.x1] == []
    assert [pair for pair in combinations(extents, 2) if extents[pair[0]].overlaps(extents[pair[1]])] == []
    ways = [axes.transData.transform(line.get_xydata()) for line in axes.lines]
    ways += [
        axes.transData.transform([each.xyann, each.xy])
        for each in axes.texts
        if isinstance(each, Annotation) and each.arrow_patch is not None
    ]
    assert len(ways) > 8
    crossed = [
        word
        for word, box in extents.items()
        for way in ways
        for (x, y), (x_end, y_end) in pairwise(way)
        if min(x, x_end) < box.x1 and max(x, x_end) > box.x0 and min(y, y_end) < box.y1 and max(y, y_end) > box.y0
    ]
    assert crossed == []


# --- the engine ---


def test_the_engine_in_words():
    lines = EngineDiagram("cache").text().splitlines()
    assert [line for line in lines if line.startswith(">")] == [
        "> cache        3        past keys and values",
        ">   blocks     8        of a common pool",
    ]
    assert not any(line.startswith(">") for line in EngineDiagram().text().splitlines())
    assert "today: cache, chapter 3, past keys and values" in EngineDiagram("cache").alt()


def test_every_chapter_but_the_first_and_last_have_a_part():
    chapters = {int(number) for part in PARTS.values() for number in part.chapter.split("–")}
    assert chapters == set(range(1, 11))


@pytest.mark.parametrize("today", PARTS)
def test_today_s_part_is_lit_with_what_is_inside(today):
    (axes,) = EngineDiagram(today).figure().axes
    thick = {patch.get_gid() for patch in axes.patches if patch.get_linewidth() > 2}
    assert thick == {today}
    lit = {name for name in PARTS if EngineDiagram(today).is_lit(name)}
    assert lit == {today} | {name for name, part in PARTS.items() if part.inside == today}


def test_an_arrow_begins_and_ends_at_the_edge_of_a_box():
    edges = [(x, y, x + width, y + height) for x, y, width, height in (part.place for part in PARTS.values())]

    def is_on_an_edge(point) -> bool:
        return any(
            x <= point[0] <= right and y <= point[1] <= bottom and (point[0] in (x, right) or point[1] in (y, bottom))
            for x, y, right, bottom in [tuple(round(each, 6) for each in edge) for edge in edges]
        )

    assert all(is_on_an_edge(way[0]) and is_on_an_edge(way[-1]) for way in ARROWS)


def test_an_unknown_part_is_refused_with_those_there_are():
    with pytest.raises(PictureError, match="'brain'.*server.*scheduler.*loop"):
        EngineDiagram("brain")


# --- a layer ---


@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_add_up_to_those_of_the_model(name):
    picture, config = LayerDiagram(CONFIGS[name]), CONFIGS[name]
    assert picture.num_weights == config.num_parameters
    assert picture.text().endswith(f"= {config.num_parameters:,} weights")
    assert f"{picture.layer_weights:,} weights in a layer" in picture.alt()


def test_every_product_is_what_it_says():
    counted = [stage for config in CONFIGS.values() for part in LayerDiagram(config).stages.values() for stage in part]
    for stage in counted:
        if stage.weights:
            assert eval(stage.product.replace(",", "").replace("×", "*")) == stage.weights, stage


def test_a_layer_in_words():
    lines = LayerDiagram(LLAMA_2_7B).text().splitlines()
    assert [line.split("  ")[0] or line.split("  ")[1] for line in lines[2:-2]] == [
        "Embedding", "32 layers:", "RMSNorm", "Q, K, V", "RoPE", "Attention", "Output matrix", "+", "RMSNorm",
        "Gate, Up", "SiLU(gate) × up", "Down", "+", "Final RMSNorm", "LM head",
    ]  # fmt: skip
    assert lines[5].split("  ")[-2:] == ["q, k, v [T, 32, 128]", " 4,096 × 3 × 4,096 = 50,331,648"]
    assert "one layer: 202,383,360 weights" in lines
    assert "RMSNorm of q and k" in LayerDiagram(SMALL).text() and "the embedding again" in LayerDiagram(SMALL).text()


def test_only_a_config_has_a_layer():
    with pytest.raises(PictureError, match="config"):
        LayerDiagram({"hidden_size": 8})
