"""Options, search spaces, and what their patterns do to a network."""

import pytest

from mpq.layers import Layer, Network
from mpq.options import Option, SearchSpace


def network(*names: str, siblings: tuple[tuple[str, ...], ...] = ()) -> Network:
    layers = tuple(
        Layer(name, "linear", (4, 8), 32, 32, (1, 8), (1, 4), weight_name=f"{name}.weight") for name in names
    )
    return Network(layers, siblings=siblings)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("int4", "int4"),
        ("int4@channel", "int4"),
        ("int4/int8", "int4/int8"),
        ("int4/int8@tensor", "int4/int8"),
        ("int4@group64/int8@token", "int4@group64/int8@token"),
        ("w4a8", "int4/int8"),
        ("W4A16", "int4/fp16"),
        ("w8", "int8"),
        ("-/int8", "-/int8"),
        ("nvfp4", "nvfp4"),
        ("fp32", "fp32"),
        ("int4@tensor", "int4@tensor"),
    ],
)
def test_label_is_the_shortest_text_and_parses_back(text, label):
    option = Option.parse(text)
    assert str(option) == label
    assert Option.parse(label) == option


@pytest.mark.parametrize("text", ["int4/int8/int8", "w99", "x4", "", "/", "int4/"])
def test_unreadable_options_are_errors(text):
    with pytest.raises(ValueError, match=r".{15,}"):
        Option.parse(text)


def test_an_option_needs_a_format():
    with pytest.raises(ValueError, match="weight format or an activation format"):
        Option(None)


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        ("w4a8", "Option.parse('w4a8'), or Option('int4@channel', 'int8@tensor')"),
        ("W8", "Option.parse('W8'), or Option('int8@channel')"),
        ("int4/int8", "Option.parse('int4/int8'), or Option('int4@channel', 'int8@tensor')"),
        ("-/int8", "Option.parse('-/int8'), or Option(None, 'int8@tensor')"),
    ],
)
def test_both_formats_in_one_text_are_for_parse(text, way_out):
    with pytest.raises(ValueError, match="weight format of an option must be one format, got") as refused:
        Option(text)
    assert way_out in str(refused.value)
    parsed, written = (eval(part, {"Option": Option}) for part in way_out.split(", or "))
    assert parsed == written
    with pytest.raises(ValueError, match=r"activation format of an option must be one format, got 'w4a8'"):
        Option("int4", "w4a8")
    with pytest.raises(ValueError, match="unknown format 'x4'"):
        Option("int4/x4")


def test_later_patterns_override_earlier_ones():
    space = SearchSpace({"*": ["int4", "int8"], "*.attn.*": ["int8"]})
    candidates = space.candidates(network("a.attn.q", "a.fc"))
    assert list(map(str, candidates["a.attn.q"])) == ["int8"]
    assert list(map(str, candidates["a.fc"])) == ["int4", "int8"]


def test_pins_are_the_only_candidate_even_if_not_an_option():
    space = SearchSpace(["int4"], pins={"f*": "int8"})
    assert list(map(str, space.candidates(network("fc", "x"))["fc"])) == ["int8"]
    assert list(map(str, space.all_options)) == ["int4", "int8"]


@pytest.mark.parametrize(
    "space",
    [
        SearchSpace(["int4"], pins={"no.such": "int8"}),
        SearchSpace({"*": ["int4"], "no.such": ["int8"]}),
        SearchSpace(["int4"], ties=["no.such"]),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_that_names_it(space):
    with pytest.raises(ValueError, match=r"no\.such.*matches no layer"):
        space.candidates(network("fc"))


def test_layers_without_options_are_named():
    with pytest.raises(ValueError, match="'b'"):
        SearchSpace({"a": ["int4"]}).candidates(network("a", "b"))


def test_ties_auto_are_the_networks_siblings_and_patterns_merge_when_they_overlap():
    net = network("q", "k", "v", "o", siblings=(("q", "k", "v"),))
    assert SearchSpace(["int4"]).tied_layers(net) == (("q", "k", "v"),)
    assert SearchSpace(["int4"], ties=None).tied_layers(net) == ()
    assert SearchSpace(["int4"], ties=["[qk]", "[kv]"]).tied_layers(net) == (("q", "k", "v"),)


def test_tied_layers_without_a_common_option_are_an_error():
    net = network("q", "k", siblings=(("q", "k"),))
    with pytest.raises(ValueError, match="q, k share none"):
        SearchSpace(["int4", "int8"], pins={"q": "int8", "k": "int4"}).candidates(net)


def test_options_without_a_weight_format_are_refused_for_layers_with_weights():
    with pytest.raises(ValueError, match="'fc'.*has no weight format"):
        SearchSpace(["-/int8"]).candidates(network("fc"))


@pytest.mark.parametrize("options", ["int4", {"*": "int4"}, [], {}])
def test_text_or_nothing_instead_of_a_list_is_an_error(options):
    with pytest.raises(ValueError, match="options"):
        SearchSpace(options)
