"""Chat templates and prompt templates."""

import numpy as np
import pytest

from flowseg_jax.data import prompts as p
from flowseg_jax.data.records import Turn
from flowseg_jax.errors import UserError

TEMPLATES = (p.REFERRING_QUESTIONS, p.REFERRING_ANSWERS, p.GENERIC_QUESTIONS, p.GENERIC_ANSWERS)


def test_templates_are_well_formed():
    for questions, answers in (TEMPLATES[:2], TEMPLATES[2:]):
        assert len(set(questions)) == len(questions) and len(set(answers)) == len(answers)
        assert all(q.count("{}") == 1 and "<" not in q for q in questions)
        assert all(a.count("<SEG>") == 1 and "{" not in a for a in answers)


@pytest.mark.parametrize("name", p.CHAT_TEMPLATES)
def test_chat_templates(name):
    chat = p.CHAT_TEMPLATES[name]
    text = chat.user_prefix + "Q" + chat.assistant_prefix + "A" + chat.suffix + chat.separator
    assert (
        text
        == {
            "qwen3_instruct": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
            "qwen3_wothinking": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nA<|im_end|>\n",
            "llama3_chat": "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
            "phi3_chat": "<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n",
        }[name]
    )
    assert all(mark in text for mark in chat.special_tokens)


def test_referring_is_fixed_without_rng():
    conversation = p.PromptTemplates().referring("  The RED  star ", 3)
    assert conversation.turns == (p.Turn("Segment <p>the red star</p>.", "<SEG>."),)
    assert conversation.phrases == (3,) and conversation.outputs == (3,)
    other = p.PromptTemplates(question=1, answer=2).referring("star", 0)
    assert other.turns == (p.Turn("Which pixels belong to <p>star</p>?", "This is it: <SEG>."),)


def test_braces_in_a_phrase_are_kept():
    assert "<p>{a} {}</p>" in p.PromptTemplates().referring("{a} {}", 0).turns[0].question


def test_generic_lists_names_and_has_one_output():
    conversation = p.PromptTemplates().generic(["Red circle", "blue star"], 8)
    assert conversation.turns == (p.Turn("Segment all of these: <p>red circle</p>, <p>blue star</p>.", "<SEG>."),)
    assert conversation.phrases == (8, 9) and conversation.outputs == (8,)


def test_training_draws_every_wording_and_vary_off_draws_none():
    rng = np.random.default_rng(0)
    drawn = {p.PromptTemplates().referring("x", 0, rng).turns[0] for _ in range(800)}
    assert len(drawn) == len(p.REFERRING_QUESTIONS) * len(p.REFERRING_ANSWERS)
    fixed = p.PromptTemplates(randomize=False)
    assert {fixed.referring("x", 0, rng).turns[0] for _ in range(20)} == {fixed.referring("x", 0).turns[0]}
    assert {fixed.generic(["x"], 0, rng).turns[0] for _ in range(20)} == {fixed.generic(["x"], 0).turns[0]}


def test_all_templates_cover_what_is_drawn():
    for prompts in (p.PromptTemplates(), p.PromptTemplates(randomize=False, question=2, answer=1)):
        templates = prompts.all_templates()
        rng = np.random.default_rng(1)
        for i in range(200):
            drawn = {
                "referring": prompts.referring("x", 0, rng),
                "generic": prompts.generic(["x"], 0, rng),
                "reasoning": prompts.reasoning("x", 0, bool(i % 2), "because {y}" if i % 3 else "", rng),
            }
            for kind, conversation in drawn.items():
                (turn,) = conversation.turns
                said = turn.question.replace("<p>x</p>", "{}"), turn.answer.replace("because {y}", "{}")
                assert Turn(*said) in templates[kind]


def test_errors():
    with pytest.raises(UserError, match=r"unknown chat template 'qwen3_instuct' \(did you mean 'qwen3_instruct'"):
        p.PromptTemplates("qwen3_instuct")
    with pytest.raises(UserError, match=r"prompts.answer: 9 is not one of the prompt templates 0\.\.4"):
        p.PromptTemplates(answer=9)
    with pytest.raises(UserError, match="must not be empty"):
        p.PromptTemplates().referring(" \n", 0)


def test_the_template_corpus_has_no_special_tokens():
    text = p.template_corpus()
    assert "user\n" in text and all("<" not in t and "{" not in t and t.strip() for t in text)
