from __future__ import annotations

import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.pipeline.options import Text
from kfac_onnx.pipeline.text import Call, read_calls


def test_blanks_and_empty_braces_mean_nothing() -> None:
    assert read_calls("") == []
    assert read_calls("  ") == []
    assert read_calls(' a { x = 1 , y = "q" } ,\n b{}') == [
        Call("a", (("x", Text("1")), ("y", Text("q", quoted=True)))),
        Call("b", ()),
    ]


@pytest.mark.parametrize(
    ("text", "message", "path"),
    [
        ("a,", "an end where the name of a pass should be at character 3", "a, >>> "),
        ("a b", "'b' where a comma should be at character 3", "a  >>> b"),
        ("a{x}", "'}' where an equals sign should be at character 4", "a{x >>> }"),
        ("a{x=}", "'}' where a value should be at character 5", "a{x= >>> }"),
        ("a{x=1", "an end where a comma or a closing brace should be at character 6", "a{x=1 >>> "),
        ("a{x=[1", "an end where a comma or a closing bracket should be at character 7", "a{x=[1 >>> "),
        ('a{x="1}', "a quote that is never closed at character 5", 'a{x= >>> "1}'),
        ('a{x="\\q"}', "a string that JSON cannot read at character 5", 'a{x= >>> "\\q"}'),
        ("{}", "'{' where the name of a pass should be at character 1", " >>> {}"),
    ],
)
def test_a_broken_text_is_pointed_at(text: str, message: str, path: str) -> None:
    with pytest.raises(UserError) as caught:
        read_calls(text)
    assert caught.value.message == f"the pipeline has {message}"
    assert caught.value.path == path
    assert caught.value.help == "a pipeline reads like: find-embeddings,lower{target=cpu},dce"
