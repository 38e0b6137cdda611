"""CLIP: the towers, the tokenizer, image towers without text, and the released code's figures."""

import gzip
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from figures import make_files, weights
from helpers import MERGES, tiny_clip
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import clip_vit
from clip_vit import FramePool, PoolConfig, load_clip, split_capitals, tokenize

FIGURES = Path(__file__).parent / "figures"


# ---- towers --------------------------------------------------------------------------------------

@torch.no_grad()
def test_towers_equal_pytorchs_own_transformer():
    """Block for block against nn.MultiheadAttention, with all rows computed."""
    clip = tiny_clip(torch.float64)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def plain(blocks, x, mask=None):
        for block in blocks:
            mha = nn.MultiheadAttention(128, 2, batch_first=True, dtype=torch.float64)
            mha.load_state_dict(block.attn.state_dict())
            y = block.ln_1(x)
            x = x + mha(y, y, y, attn_mask=mask, need_weights=False)[0]
            y = block.mlp.c_fc(block.ln_2(x))
            x = x + block.mlp.c_proj(y / (1 + (-1.702 * y).exp()))
        return x

    v = clip.visual
    patches = v.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([v.class_embedding.expand(2, 1, -1), patches], 1) + v.positional_embedding
    expected = v.ln_post(plain(v.transformer.resblocks, v.ln_pre(x))[:, 0]) @ v.proj
    torch.testing.assert_close(clip.encode_image(images), expected, rtol=0, atol=1e-10)

    tokens = clip.tokenize(["a pic red", "x", ""])
    x = clip.token_embedding(tokens) + clip.positional_embedding
    x = plain(clip.transformer.resblocks, x, torch.full((32, 32), -torch.inf, dtype=x.dtype).triu(1))
    expected = clip.ln_final(x)[range(3), [8, 2, 1]] @ clip.text_projection
    torch.testing.assert_close(clip.encode_text(tokens), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_frame_pooling_is_the_mean_of_the_frames_and_blind_to_their_order():
    model = FramePool(tiny_clip(torch.float64), PoolConfig("a pic")).eval()
    model.set_classes(["red to blue", "under_score"])
    video = torch.randn(2, 5, 3, 32, 32, dtype=torch.float64)
    features = torch.stack([model.clip.encode_image(video[:, t]) for t in range(5)]).mean(0)
    text = model.clip.encode_text(model.clip.tokenize(["a pic red to blue.", "a pic under_score."]))
    expected = model.clip.logit_scale.exp() * nn.functional.normalize(features) @ nn.functional.normalize(text).T
    torch.testing.assert_close(model(video)[0], expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(model(video.flip(1))[0], expected, rtol=0, atol=1e-11)


@torch.no_grad()
def test_templates_are_averaged_as_normalised_features():
    model = FramePool(tiny_clip(torch.float64), PoolConfig("a pic")).eval()
    names, video = ["redBall", "blue_ball"], torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    def features(texts):
        return model.clip.encode_text(model.clip.tokenize(texts))
    plain = features(["a pic red Ball.", "a pic blue_ball."])
    assert torch.equal(model.encode_names(names), plain)
    several = torch.stack([nn.functional.normalize(features([t.replace("{}", n) for n in ("red Ball", "blue_ball")]))
                           for t in ("a {}", "{}!", "a pic {}.")]).mean(0)
    templates = ["a {}", "{}!", "a pic {}."]
    torch.testing.assert_close(model.encode_names(names, video, templates), several, rtol=0, atol=1e-14)
    model.set_classes(names, templates)
    want = clip_vit.cosine_logits(model.encode_video(video), several, model.clip.logit_scale)
    torch.testing.assert_close(model(video)[0], want, rtol=0, atol=1e-13)
    for wrong, words in (([], "no prompt templates"), (["a {}", "none"], "'none' has no {}"), ("a {}", "list of strings")):
        with pytest.raises(ValueError, match=words):
            model.set_classes(names, wrong)


@pytest.mark.parametrize("own", [False, True], ids=["shared text", "text of each video"])
def test_logits_are_not_rounded_under_autocast(own):
    """In 16 bits logits near 25 come in steps of 1/8, so that most classes tie with another."""
    video, noise = torch.randn(3, 512), torch.randn(400, 512)
    text = video.mean(0) + 4 * noise  # CLIP's cosines: all alike
    text = text.expand(3, -1, -1) if own else text
    scale = torch.tensor(100.0).log()
    exact = clip_vit.cosine_logits(video.double(), text.double(), scale.double())
    with torch.autocast("cpu", torch.bfloat16):
        logits = clip_vit.cosine_logits(video, text, scale)
        rounded = clip_vit.cosine_logits(video.bfloat16(), text.bfloat16(), scale)  # as the towers give them
        double = clip_vit.cosine_logits(video.double(), text.double(), scale.double())
    assert torch.equal(logits, clip_vit.cosine_logits(video, text, scale)) and torch.equal(double, exact)
    assert logits.dtype == rounded.dtype == torch.float32 and len(rounded[0].unique()) == 400
    torch.testing.assert_close(rounded, exact.float(), rtol=0, atol=0.1)
    assert clip_vit.cosine_logits(video.bfloat16(), text.bfloat16(), scale.bfloat16()).dtype == torch.bfloat16


def test_towers_take_activation_head_width_and_mlp_width():
    """Each argument changes the tower it is for, as nn.MultiheadAttention and F.gelu say."""
    block = clip_vit.Block(160, mlp_width=96, head_width=80, activation="gelu", eps=1e-3).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.1)
    mha = nn.MultiheadAttention(160, 2, batch_first=True, dtype=torch.float64)
    mha.load_state_dict(block.attn.state_dict())
    x = torch.randn(3, 5, 160, dtype=torch.float64)
    y = nn.functional.layer_norm(x, (160,), block.ln_1.weight, block.ln_1.bias, 1e-3)
    want = x + mha(y, y, y, need_weights=False)[0]
    y = nn.functional.layer_norm(want, (160,), block.ln_2.weight, block.ln_2.bias, 1e-3)
    y = block.mlp.c_fc(y)
    assert y.shape == (3, 5, 96)
    want = want + block.mlp.c_proj(y * (1 + torch.erf(y / 2 ** 0.5)) / 2)
    torch.testing.assert_close(block(x), want, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="multiples of the head width: 160 .* 64"):
        clip_vit.Attention(160)


def test_a_causal_block_takes_only_rows_from_the_first():
    block, x = clip_vit.Block(64), torch.randn(1, 6, 64)
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    assert torch.allclose(block(x, causal=True, rows=slice(0, 4)), block(x, causal=True)[:, :4], atol=1e-6)
    for wrong in (dict(rows=slice(1, 4)), dict(rows=slice(0, 4, 2)), dict(extra=x)):
        with pytest.raises(AssertionError):
            block(x, causal=True, **wrong)


def test_the_text_is_kept_only_while_no_weight_can_change():
    model, calls = FramePool(tiny_clip(), PoolConfig("a pic")), []
    model.set_classes(["red", "blue"])
    compute = model.clip.encode_text
    model.clip.encode_text = lambda tokens: calls.append(1) or compute(tokens)
    video = torch.randn(1, 2, 3, 32, 32)

    def computed(call):
        calls.clear()
        call()
        return len(calls)

    with torch.no_grad():
        assert computed(lambda: model.train()(video)) == computed(lambda: model(video)) == 1
        assert computed(lambda: model.eval()(video)) == 1 and computed(lambda: model(video)) == 0
        before = model(video)[0]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(video)[0][0, 0].backward()  # fine-tuning in eval mode: the text trains too
    assert model.clip.text_projection.grad.abs().sum() > 0
    optimizer.step()
    with torch.no_grad():
        text = model.clip.encode_text(model.tokens[0])
        after, fresh = model(video)[0], clip_vit.cosine_logits(model.encode_video(video), text, model.clip.logit_scale)
        assert torch.equal(after, fresh) and not torch.equal(after, before)
        model.clip.text_projection.data.mul_(torch.randn_like(model.clip.text_projection))
        assert torch.equal(model(video)[0], after)  # as documented: nobody told it
        model.text_cache.drop()
        assert not torch.equal(model(video)[0], after)


@pytest.mark.slow
def test_export_with_any_batch():
    """The text becomes a constant of the graph; the batch stays free."""
    model, video = FramePool(tiny_clip(), PoolConfig("a pic")).eval(), torch.randn(5, 3, 3, 32, 32)
    model.set_classes(["red", "blue"])
    shapes = {"video": {0: torch.export.Dim("batch")}}
    with pytest.raises(ValueError, match="before torch.export run the model"):
        torch.export.export(model, (video[:2],), dynamic_shapes=shapes)
    with torch.no_grad():
        want = model(video)[0]
        graph = torch.export.export(model, (video[:2],), dynamic_shapes=shapes).module()
        for batch in (1, 2, 5):
            torch.testing.assert_close(graph(video[:batch])[0], want[:batch], rtol=0, atol=1e-5)


def test_wrong_resolution_is_named():
    with pytest.raises(ValueError, match=r"\(40, 40\).*32"):
        tiny_clip().encode_image(torch.zeros(1, 3, 40, 40))


# ---- tokenizer -------------------------------------------------------------------------------------------------------

@given(st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=25), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_byte_tokenizer_says_the_words_back(texts):
    """Without merges every byte of every word is a token, the word's last one marked: nothing is lost but white space.

    The names of the start and end tokens are no words: OpenAI's tokenizer reads them as those tokens.
    """
    assume(not any(re.search(r"<\|(start|end)oftext\|>", html.unescape(html.unescape(text)), re.I) for text in texts))
    tokens = tokenize(texts, 80, vocabulary=514)
    symbols = list(clip_vit.byte_symbols().values())
    for text, row in zip(texts, tokens.tolist()):
        end = row.index(513)
        assert row[0] == 512 and set(row[end + 1:]) <= {0}
        read = "".join(symbols[i % 256] for i in row[1:end])
        clean = html.unescape(html.unescape(clip_vit.fix_text(text))).lower()
        assert read == "".join("".join(symbols[[*clip_vit.byte_symbols()].index(b)] for b in c.encode())
                               for c in clean if not c.isspace())


TEXTS = json.loads((FIGURES / "tokens.json").read_text())  # [text, words, ids] of OpenAI's tokenizer with ftfy 6.3.1


def test_names_of_special_tokens_are_those_tokens():
    assert tokenize(["a <|STARTOFTEXT|> b"], 8, vocabulary=514).tolist() == [[512, 256 + 64, 512, 256 + 65, 513, 0, 0, 0]]


def test_words_equal_openais():
    """Quotes, ligatures, widths, accents, numerals, entities, control codes, surrogates; then random mixtures."""
    assert len(TEXTS) == 200
    assert [(text, clip_vit.split_words(text)) for text, _, _ in TEXTS] == [(text, words) for text, words, _ in TEXTS]


def test_ids_equal_openais():
    if not MERGES.is_file():
        pytest.skip(f"the vocabulary ({MERGES}) is not here")
    for text, _, ids in TEXTS:
        tokens = tokenize([text], 77, MERGES)[0].tolist()
        assert tokens[:len(ids) + 2] == [49406, *ids, 49407] and not any(tokens[len(ids) + 2:]), text


@given(st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_any_text_has_words_and_fixing_it_again_changes_nothing(text):
    fixed = clip_vit.fix_text(text)
    assert "<" in fixed or clip_vit.fix_text(fixed) == fixed
    assert tokenize([text], 400, vocabulary=514).max() == 513


@pytest.mark.parametrize("content, words", [
    (None, "no such file of BPE merges"), (b"#version\na b\n", "not a file of BPE merges .*gzip"),
    (gzip.compress(b"#version\na b\n", mtime=0)[:-9], "not a file of BPE merges"),
    (gzip.compress(b"#version\na b\n", mtime=0), "not the 2 BPE merges"),
    (gzip.compress(b"#version\na b\na b c\n", mtime=0), "not the 2 BPE merges")])
def test_a_vocabulary_that_is_none_is_named(tmp_path, content, words):
    path = tmp_path / "merges.txt.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"merges.txt.gz: .*{words}.*https://"):
        tokenize(["a"], 9, path, 516)
    with pytest.raises(ValueError, match="513 ids"):
        tokenize(["a"], 9, path, 513)


def test_too_long_a_text_is_refused():
    assert tokenize(["x" * 30], 32, vocabulary=514).shape == (1, 32)
    with pytest.raises(ValueError, match="33 tokens does not fit in 32"):
        tokenize(["x" * 31], 32, vocabulary=514)
    with pytest.raises(ValueError, match="list of strings"):
        tokenize("x", 32, vocabulary=514)


@given(st.text(st.characters(min_codepoint=65, max_codepoint=122), max_size=20))
def test_split_capitals(name):
    split = split_capitals(name)
    assert split.replace(" ", "") == name.replace(" ", "") and "  " not in split and split == split.strip()


def test_released_prompts():
    notes = json.loads((FIGURES / "k_prompts.json").read_text())
    figures = np.load(FIGURES / "k_prompts.npz")
    names = [split_capitals(name) for name in notes["raw"]]
    assert [f"a photo of a {name}." for name in names] == notes["vifi"]
    assert [f"a photo of a {name.replace('_', ' ')}." for name in names] == notes["tc"]
    for texts, length, key in ((notes["tc"], 30, "tokens_tc"), (notes["vifi"], 30, "tokens_vifi"), (notes["raw"], 77, "tokens_raw77")):
        assert (tokenize(texts, length, MERGES).numpy() == figures[key]).all()


# ---- image towers without text -------------------------------------------------------------------

@pytest.fixture(scope="module")
def vit_files(tmp_path_factory):
    """An ImageNet-21k ViT in timm's and in Google's layout, and what timm computes from it in float64."""
    folder = tmp_path_factory.mktemp("vit")
    fixture = FIGURES / "vit_in21k.json"
    paths = {path.suffix: path for path in make_files.make(fixture, folder)}
    return paths, np.load(fixture.with_suffix(".npz"))


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".bin", ".npz", ".safetensors"])
def test_vit_without_text_equals_timm(vit_files, suffix):
    paths, figures = vit_files
    tower = load_clip(paths[suffix])
    images = torch.from_numpy(weights.video(2, 1, 64)[:, 0])
    np.testing.assert_allclose(tower.encode_image(images).numpy(), figures["features"], rtol=0, atol=1e-10)
    content = clip_vit.read_checkpoint(paths[suffix])
    assert torch.equal(load_clip(content).encode_image(images), tower.encode_image(images))
    visual = tower.visual
    x = visual.tokens(images) + visual.positional_embedding
    for block in visual.transformer.resblocks:
        x = block(x)
    np.testing.assert_allclose(visual.project(x)[:, 1:4].numpy(), figures["patches"], rtol=0, atol=1e-10)
    assert not tower.training and (visual.width, visual.embed, visual.grid) == (128, 128, 4)


def test_a_tower_without_text_is_saved_and_read_under_our_keys(vit_files, tmp_path):
    tower = load_clip(vit_files[0][".npz"])
    torch.save({"model": {f"clip.{k}": v for k, v in tower.state_dict().items()}}, tmp_path / "best.pt")
    again, images = load_clip(tmp_path / "best.pt"), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(again.encode_image(images), tower.encode_image(images))


def test_clips_own_tower_without_its_text_is_clips():
    """What a released file that lacks the text tower holds: norm before the blocks, projection, QuickGELU."""
    clip, images = tiny_clip(), torch.randn(2, 3, 32, 32)
    state = {key: value for key, value in clip.state_dict().items() if key.startswith("visual.")}
    assert torch.equal(load_clip(state).encode_image(images), clip.encode_image(images))


def google_vit(head_width):
    """Arrays of Google's layout for one block of two heads."""
    fixture = json.loads((FIGURES / "vit_in21k.json").read_text())
    shapes = {k: v for k, v in fixture["layouts"]["timm"].items() if not k.startswith(("blocks.1", "blocks.2"))}
    width, scaled = 2 * head_width, {128: 2 * head_width, 384: 6 * head_width, 512: 80}
    state = {k: torch.from_numpy(weights.tensor(k, [scaled.get(n, n) for n in v])) for k, v in shapes.items()}
    return state, make_files.google_vit(state, heads=2), width


def test_googles_file_tells_the_head_width():
    timm, google, width = google_vit(head_width=72)  # 144 is no multiple of 64
    timm["pre_logits.fc.weight"] = google["pre_logits/kernel"] = torch.zeros(width, width)  # of the head, as in 2020
    tower, images = load_clip(google), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert tower.visual.transformer.resblocks[0].attn.heads == 2
    assert tower.visual.transformer.resblocks[0].mlp.c_fc.out_features == 80
    assert torch.equal(load_clip(timm, head_width=72).encode_image(images), tower.encode_image(images))
    with pytest.raises(ValueError, match="head width: 144 .* 64; set head_width"):
        load_clip(timm)


def test_wide_towers_need_their_head_width():
    assert clip_vit.known_head_width(1024) == 64 and clip_vit.known_head_width(1280, 80) == 80
    with pytest.raises(ValueError, match="1280.*set head_width"):
        clip_vit.known_head_width(1280)


@pytest.mark.parametrize("change, words", [
    (lambda s: s.update({"blocks.0.ls1.gamma": torch.ones(144)}), "ls1.gamma"),
    (lambda s: s.pop("norm.bias"), "ln_post.bias"),
    (lambda s: s.update(pos_embed=torch.zeros(1, 18, 144)), "positional_embedding")])
def test_other_vits_are_refused_by_name(change, words):
    state, _, _ = google_vit(72)
    change(state)
    with pytest.raises(ValueError, match=words):
        load_clip(state, head_width=72)


@pytest.mark.parametrize("key", ["embedding/bias", "Transformer/encoderblock_0/LayerNorm_0/scale"])
def test_an_incomplete_vit_of_google_is_refused_by_name(key):
    _, google, _ = google_vit(64)
    del google[key]
    with pytest.raises(ValueError, match=f"Google.*{key}"):
        load_clip(google)


def test_methods_with_text_say_that_there_is_none():
    tower = load_clip({k: v for k, v in tiny_clip().state_dict().items() if k.startswith("visual.")})
    with pytest.raises(ValueError, match="no text tower"):
        FramePool(tower)


# ---- the released code's figures ---------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("fixture, arch", [
    ("a_openai_tiny", "tiny"), pytest.param("a_openai_b16", "ViT-B/16", marks=pytest.mark.slow)])
def test_released_figures(fixture, arch):
    figures = np.load(FIGURES / f"{fixture}.npz")
    clip = load_clip(weights.openai_state_dict(arch), MERGES)
    tokens = clip.tokenize(weights.CLASS_NAMES)
    assert (tokens.numpy() == figures["tokens"]).all()
    images = clip.encode_image(torch.from_numpy(weights.video(2, 1, 224)[:, 0]))
    np.testing.assert_allclose(images.numpy(), figures["image_features"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(clip.encode_text(tokens).numpy(), figures["text_features"], rtol=0, atol=1e-10)
    if arch == "ViT-B/16":
        pool, figures = FramePool(clip).eval(), np.load(FIGURES / "b_vifi_b16_t8.npz")
        pool.set_classes(weights.CLASS_NAMES)
        logits, _ = pool(torch.from_numpy(weights.video(2, 8, 224)))
        np.testing.assert_allclose(logits.numpy(), figures["logits"], rtol=0, atol=1e-9)
