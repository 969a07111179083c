import pytest
from pydantic import ValidationError

from couturier.serving.forms import BadRequest, FeedbackForm, GenerateForm, ScoreForm


def refusal(form, **values):
    with pytest.raises(BadRequest) as caught:
        form(**values)
    assert not isinstance(caught.value, ValidationError)
    return str(caught.value)


def test_errors_name_the_field_and_the_value():
    assert "n is 0." in refusal(GenerateForm, user_id="a", n=0)
    assert "n is 65." in refusal(GenerateForm, user_id="a", n=65)
    assert "guidance is 'much'" in refusal(GenerateForm, user_id="a", guidance="much")
    assert "n is '4'" in refusal(GenerateForm, user_id="a", n="4"), "numbers are not guessed from text"
    assert "temperature" in refusal(GenerateForm, user_id="a", temperature=float("inf"))
    assert "item_ids is missing" in refusal(ScoreForm, user_id="a")


def test_every_error_of_a_form_is_said():
    sentence = refusal(GenerateForm, user_id="a", n=0, seed=-1)
    assert "n is 0" in sentence and "seed is -1" in sentence


def test_unknown_fields_are_refused_with_the_known_ones():
    sentence = refusal(GenerateForm, user_id="a", url="http://example.org/a.png")
    assert "url is not a field" in sentence and "temperature" in sentence


@pytest.mark.parametrize("about", [{}, {"user_id": "a", "history": ["b"]}])
def test_either_a_person_or_a_history(about):
    assert "either user_id or history" in refusal(GenerateForm, **about)


def test_empty_and_endless_histories_are_refused():
    assert "history" in refusal(GenerateForm, history=[])
    assert "history" in refusal(GenerateForm, history=["a"] * 201)


@pytest.mark.parametrize("bad", ["", "a\nb", "a\x00", "x" * 257])
def test_ids_hold_no_control_characters_and_have_a_length(bad):
    assert "user_id" in refusal(GenerateForm, user_id=bad)


def test_a_long_value_is_cut_in_the_sentence():
    assert len(refusal(GenerateForm, user_id="x" * 50_000)) < 300


def test_feedback_is_about_one_thing_and_of_a_known_kind():
    assert "either item_id or generation_id" in refusal(FeedbackForm, user_id="a", kind="like")
    assert "kind is 'adore'" in refusal(FeedbackForm, user_id="a", item_id="b", kind="adore")
    assert "value is 1000.5" in refusal(FeedbackForm, user_id="a", item_id="b", kind="like", value=1000.5)
    assert FeedbackForm(user_id="a", item_id="b", kind="like").value == 1.0
