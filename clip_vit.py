"""CLIP (Radford et al. 2021): the image and text towers that every method here starts from.

    image -> patches -> pre-norm transformer -> class token -> joint space
    text  -> tokens  -> the same, causal     -> end token   -> joint space: cosines are compared

Sections: tokenizer; towers; image towers without text; what the video models share; frame pooling;
weights from disk. A reader who wants the model begins with the towers.

Parameter names are the keys of OpenAI's state_dict, so weights load strictly and need no table of
names. All sizes are read off the tensors; what no tensor tells (activation, head width) is an
argument of the towers.

Letters, here and in every file: B videos, T frames, P patches, N = 1 + P tokens of a frame,
D width, E joint width, H heads of width d, C classes, L text length, R image side in pixels.
"""

import contextlib
import gzip
import hashlib
import html
import html.entities
import http.client
import io
import math
import os
import pickle
import re
import unicodedata
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

HEAD_WIDTH = 64  # d in OpenAI's ViT towers; no tensor's shape tells it
OPENAI = "https://openaipublic.azureedge.net/clip/models/{sha256}/{file}"
OPENAI_MODELS = {  # name: (SHA-256, file), https://github.com/openai/CLIP/blob/main/clip/clip.py
    "ViT-B/32": (
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": (
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": (
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": (
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}
MERGES_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
BYTES = 514  # size of a vocabulary without merges: 256 bytes, 256 bytes at a word's end, start, end


# ---- tokenizer -----------------------------------------------------------------------------------

START, END = "<|startoftext|>", "<|endoftext|>"
# White space as Unicode has it: Python's \s also holds U+001C to U+001F, which are punctuation here
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
ENTITY = re.compile("&#?[0-9A-Za-z]{1,24};")  # of HTML
LIGATURES = "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬅﬆ"
CONTROL = re.compile(r"\x1b\[[\d;]*[a-zA-Z]"
                     r"|[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")


@lru_cache
def plain_forms():
    """For str.translate, {character: its plain form}: quotes, ligatures, wide and narrow letters,
    and the control characters U+0080 to U+009F, which are read as Windows-1252."""
    forms = dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'")
    forms |= dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
    for ligature in LIGATURES:
        codes = unicodedata.decomposition(ligature).split()[1:]  # "<compat> 0066 0069" is fi
        forms[ligature] = "".join(chr(int(code, 16)) for code in codes)
    for wide in ["\u3000", *map(chr, range(0xFF01, 0xFFF0))]:
        forms[wide] = unicodedata.normalize("NFKC", wide)
    for byte in range(0x80, 0xA0):
        forms[chr(byte)] = bytes([byte]).decode("cp1252", errors="ignore") or chr(byte)
    return str.maketrans(forms)


def unescape_entity(match):
    """One entity of HTML as ftfy reads it: names in their own case, or all in capitals."""
    entity = match[0]
    name = entity[1:].lower()
    if entity[1:] in html.entities.html5:
        return html.entities.html5[entity[1:]]
    if entity.startswith("&#"):
        char = html.unescape(entity)
        return entity if ";" in char else char  # not a number after all
    if entity[1:] == name.upper() and name in html.entities.html5:
        if html.unescape(entity) == entity:  # else a shorter name fits
            return html.entities.html5[name].upper()
    return entity


def fix_text(text):
    """Text as ftfy 6, which OpenAI cleans with, repairs it; text in a wrong encoding stays wrong.

    Entities of HTML are read (not beside a "<"), characters get their plain forms, surrogates
    become characters or U+FFFD, escape and control codes go, accents are composed (NFC); all of it
    until nothing changes.
    """
    entities, before = "<" not in text, None
    while text != before:
        before = text
        if entities:
            text = ENTITY.sub(unescape_entity, text)
        text = text.translate(plain_forms())
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = unicodedata.normalize("NFC", CONTROL.sub("", text))
    return text


def split_words(text):
    """Text -> words as OpenAI's pattern finds them: the two special tokens, contractions, runs of
    letters, single numerals, runs of anything else but white space; all in lower case."""
    text = html.unescape(html.unescape(fix_text(text))).strip()
    text = re.sub(f"[{SPACE}]+", " ", text).strip().lower()
    # OpenAI's classes L and N, which `re` lacks: \w is L, N and "_", and \d is only a part of N.
    # U+0345, whose capital is a letter, falls out of the pattern when capitals are ignored.
    numerals = "".join(char for char in text if unicodedata.category(char) in ("Nl", "No"))
    return re.findall(rf"{re.escape(START)}|{re.escape(END)}|'s|'t|'re|'ve|'m|'ll|'d"
                      rf"|[^\W\d_{numerals}]+|[\d{numerals}]"
                      rf"|(?:[^{SPACE}\w\u0345]|_)+", text, re.IGNORECASE)


@lru_cache
def byte_symbols():
    """{byte: the printable character that stands for it}, in the order of the first 256 ids."""
    printable = [*range(ord("!"), ord("~") + 1),
                 *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in printable:
            symbols[byte] = chr(256 + len(symbols) - len(printable))
    return symbols


def read_merges(path, count):
    """The first `count` pairs of symbols in a file of BPE merges. Raises ValueError naming it."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file of BPE merges; get it from {MERGES_URL}")
    try:
        with gzip.open(path) as file:
            lines = file.read(1 << 24).decode().split("\n")  # OpenAI's has 3 MB
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: not a file of BPE merges ({error}); "
                         f"get it from {MERGES_URL}") from error
    pairs = [tuple(line.split()) for line in lines[1:1 + count]]  # line 0 is a header
    if len(pairs) != count or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{path}: these are not the {count} BPE merges that the weights need; "
                         f"get the file from {MERGES_URL}")
    return pairs


@lru_cache
def read_vocabulary(path, size):
    """A vocabulary of `size` ids: {symbol: id}, {pair: rank}. With BYTES ids, no file is read."""
    if size < BYTES:
        raise ValueError(f"a vocabulary of {size} ids is none of CLIP's: bytes need {BYTES}")
    pairs = read_merges(path, size - BYTES) if size > BYTES else []
    symbols = list(byte_symbols().values())
    symbols += [symbol + "</w>" for symbol in symbols]
    symbols += ["".join(pair) for pair in pairs]
    symbols += [START, END]
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    return ids, ranks


def join_pair(parts, pair):
    """The symbols with every occurrence of the adjacent pair joined to one symbol."""
    joined, i = [], 0
    while i < len(parts):
        step = 2 if tuple(parts[i:i + 2]) == pair else 1
        joined.append("".join(parts[i:i + step]))
        i += step
    return joined


def byte_pair_encode(word, ranks):
    """Splits a word into symbols: starts from bytes and joins the pair of lowest rank until none is
    left."""
    parts = [byte_symbols()[byte] for byte in word.encode()]
    parts[-1] += "</w>"
    while len(parts) > 1:
        best = min(zip(parts, parts[1:]), key=lambda pair: ranks.get(pair, math.inf))
        if best not in ranks:
            break
        parts = join_pair(parts, best)
    return parts


def no_string(texts):
    """Returns the texts. Raises ValueError if one string is given in place of a list of them."""
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of strings; got the string {texts!r:.100}")
    return texts


def tokenize(texts, length=77, merges=None, vocabulary=49408):
    """C strings -> (C,length) int64: start token, byte-pair ids, end token, zeros.

    `merges` is the path of bpe_simple_vocab_16e6.txt.gz (default: the cache folder, downloaded
    once). Raises ValueError if a text needs more than `length` tokens.
    """
    if len(no_string(texts)) == 0:
        raise ValueError("there are no texts (class names) to tokenize")
    if merges is None and vocabulary > BYTES:
        merges = cached(MERGES_URL, MERGES_SHA256)
    ids, ranks = read_vocabulary(merges, vocabulary)
    tokens = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(tokens, texts):
        parts = [START]
        for word in split_words(text):
            parts += [word] if word in (START, END) else byte_pair_encode(word, ranks)
        parts.append(END)
        if len(parts) > length:
            raise ValueError(f"text of {len(parts)} tokens does not fit in {length}: {text!r:.100};"
                             " shorten it, or in TC-CLIP's training raise text_length")
        row[:len(parts)] = torch.tensor([ids[part] for part in parts])
    return tokens


# ---- towers --------------------------------------------------------------------------------------

class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x):
        # x sigmoid(1.702 x) = silu(1.702 x) / 1.702. A third faster and stores half as much for
        # backward; without gradients it runs in place, twice as fast again.
        return F.silu(1.702 * x, inplace=not torch.is_grad_enabled()).div_(1.702)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}  # OpenAI's; most others', by erf


def known_head_width(width, head_width=None):
    """The head width d of a tower: the given one, or 64, which holds for all usual ViTs up to L.

    Raises ValueError for wider towers if it is not given.
    """
    if head_width is None and width > 1024:
        raise ValueError(f"no tensor tells the head width of a tower of width {width}: set "
                         "head_width (80 for ViT-H, 88 for ViT-g, 104 for ViT-bigG)")
    return head_width or HEAD_WIDTH


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(d)) v; parameters as in nn.MultiheadAttention.

    It comes in steps, because the video methods put further keys and values in between. Raises
    ValueError if the width D is not a multiple of the head width d.
    """

    def __init__(self, width, head_width=HEAD_WIDTH):
        super().__init__()
        if width % head_width:
            raise ValueError(f"widths must be multiples of the head width: {width} is not one of "
                             f"{head_width}; set head_width")
        self.heads, self.head_width = width // head_width, head_width
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def queries(self, x):
        """(..., n, D) -> (..., H, n, d)."""
        D = x.shape[-1]
        return self.split(F.linear(x, self.in_proj_weight[:D], self.in_proj_bias[:D]))

    def project_kv(self, x):
        """(..., n, D) -> keys and values side by side, (..., n, 2D)."""
        D = x.shape[-1]
        return F.linear(x, self.in_proj_weight[D:], self.in_proj_bias[D:])

    def keys_values(self, x):
        """(..., n, D) -> keys and values, each (..., H, n, d)."""
        k, v = self.project_kv(x).chunk(2, dim=-1)
        return self.split(k), self.split(v)

    def split(self, x):
        """(..., n, D) -> (..., H, n, d)."""
        return x.unflatten(-1, (self.heads, self.head_width)).transpose(-2, -3)

    def project_out(self, heads):
        """(..., H, n, d) -> (..., n, D)."""
        return self.out_proj(heads.transpose(-2, -3).flatten(-2))

    def forward(self, x_q, x_kv, causal=False):
        """Queries from x_q (..., n, D), keys and values from x_kv (..., m, D) -> (..., n, D)."""
        q = self.queries(x_q)
        k, v = self.keys_values(x_kv)
        return self.project_out(F.scaled_dot_product_attention(q, k, v, is_causal=causal))


class Block(nn.Module):
    """Pre-norm transformer block: x + Attn(LN_1 x, LN_1 [x; extra]), then x + MLP(LN_2 x).

    The MLP is 4 D wide unless `mlp_width` says otherwise; `activation` is quick_gelu or gelu.
    """

    def __init__(self, width, mlp_width=None, head_width=HEAD_WIDTH, activation="quick_gelu",
                 eps=1e-5):
        super().__init__()
        mlp_width = mlp_width or 4 * width
        self.checkpointing = False
        self.attn = Attention(width, head_width)
        self.ln_1 = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, mlp_width),
            gelu=ACTIVATIONS[activation](),
            c_proj=nn.Linear(mlp_width, width)))
        self.ln_2 = nn.LayerNorm(width, eps)

    def forward(self, x, causal=False, rows=slice(None), extra=None):
        """x (..., n, D) -> the given rows of the block's output; no other rows are computed.

        `extra` (..., m, D) are further keys and values. A causal block needs rows from 0 and no
        extra: its mask counts queries and keys from the same position.
        """
        assert not causal or (rows.start in (None, 0) and rows.step is None and extra is None)
        return self.run(self.compute, x, causal, rows, extra)

    def run(self, work, *inputs):
        """work(*inputs), which is this block's part of a model. While `checkpointing`, training
        stores only the inputs and recomputes the rest in backward."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(work, *inputs, use_reentrant=False)
        return work(*inputs)

    def compute(self, x, causal, rows, extra):
        y = y_kv = self.ln_1(x)  # (..., n, D)
        if extra is not None:
            y_kv = torch.cat([y, self.ln_1(extra)], dim=-2)  # (..., n+m, D)
        x = x[..., rows, :] + self.attn(y[..., rows, :], y_kv, causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A list of blocks. It exists for OpenAI's key names, `transformer.resblocks.{i}`."""

    def __init__(self, blocks):
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)


class VisionTransformer(nn.Module):
    """An image tower around a list of blocks: CLIP's, or that of an image classifier.

    A classifier's tower has a bias in its patch convolution (`patch_bias`), no norm before the
    blocks (`pre_norm`) and no joint space (`embed` is None): its features have the width E = D.
    """

    def __init__(self, resolution, patch, width, embed, blocks, patch_bias=False, pre_norm=True,
                 eps=1e-5):
        super().__init__()
        self.resolution, self.grid = resolution, resolution // patch
        self.width, self.embed = width, embed or width
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=patch_bias)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(self.grid ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width, eps) if pre_norm else nn.Identity()
        self.transformer = Transformer(blocks)
        self.ln_post = nn.LayerNorm(width, eps)
        self.proj = nn.Parameter(torch.zeros(width, embed)) if embed else None

    def tokens(self, images):
        """(B,3,R,R) -> class token and patches, without positions: (B,N,D)."""
        if images.shape[-2:] != (self.resolution, self.resolution):
            raise ValueError(f"images are {tuple(images.shape[-2:])} pixels; "
                             f"these weights need {self.resolution}")
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B,P,D)
        class_token = self.class_embedding.expand(images.shape[0], 1, -1)  # (B,1,D)
        return torch.cat([class_token, patches], dim=1)

    def project(self, x):
        """Rows after the last block (..., D) -> features (..., E): the last norm, then `proj`."""
        x = self.ln_post(x)
        return x if self.proj is None else x @ self.proj

    def forward(self, images):
        """(B,3,R,R) -> (B,E). The last block computes only the class row: no other is used."""
        x = self.ln_pre(self.tokens(images) + self.positional_embedding)  # (B,N,D)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x)
        x = last(x, rows=slice(0, 1))  # (B,1,D)
        return self.project(x[:, 0])


class CLIP(nn.Module):
    """Both towers. `load_clip` builds it and reads the sizes off the weights.

    No tensor tells `activation` (quick_gelu or gelu, in both towers), `head_width` (of the image
    tower) and `text_head_width`. An MLP is 4 D wide if its width is not given.
    """

    def __init__(self, *, embed, resolution, patch, vision_width, vision_layers, text_length,
                 vocabulary, text_width, text_layers, vision_mlp_width=None, text_mlp_width=None,
                 activation="quick_gelu", head_width=HEAD_WIDTH, text_head_width=HEAD_WIDTH):
        super().__init__()
        self.merges = None  # path of the BPE merges; None: OpenAI's file in the cache folder
        vision_blocks = [Block(vision_width, vision_mlp_width, head_width, activation)
                         for _ in range(vision_layers)]
        text_blocks = [Block(text_width, text_mlp_width, text_head_width, activation)
                       for _ in range(text_layers)]
        self.visual = VisionTransformer(resolution, patch, vision_width, embed, vision_blocks)
        self.transformer = Transformer(text_blocks)
        self.token_embedding = nn.Embedding(vocabulary, text_width)
        self.positional_embedding = nn.Parameter(torch.zeros(text_length, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.zeros(text_width, embed))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, images):
        """Normalised images (B,3,R,R) -> features (B,E), not normalised."""
        return self.visual(images)

    def encode_text(self, tokens):
        """Token ids (C,L) -> features (C,E), not normalised.

        The feature is read at the end token, which has the largest id.
        """
        end = tokens.argmax(dim=-1)  # (C,)
        tokens = tokens[:, :int(end.max()) + 1]  # causal: what follows has no effect [ours, exact]
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]  # (C,L,D)
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
        x = x[torch.arange(len(x), device=x.device), end]  # (C,D)
        return self.ln_final(x) @ self.text_projection

    def tokenize(self, texts, length=None):
        """C strings -> (C,length) int64 in this model's vocabulary, on its weights' device."""
        length = length or len(self.positional_embedding)
        ids = tokenize(texts, length, self.merges, self.token_embedding.num_embeddings)
        return ids.to(self.positional_embedding.device)


# ---- image towers without text -------------------------------------------------------------------

TIMM_NAMES = (  # timm's name as a regular expression, ours; applied in this order
    (r"^cls_token$", "class_embedding"), (r"^pos_embed$", "positional_embedding"),
    (r"^patch_embed\.proj\.", "conv1."), (r"^norm\.", "ln_post."),
    (r"^blocks\.", "transformer.resblocks."), (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"), (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.mlp\.fc2\.", ".mlp.c_proj."))


class VisionOnly(nn.Module):
    """An image tower without a text tower, such as an ImageNet-21k ViT, in the place of a CLIP.

    ILA runs on it when it has a linear head. Methods that compare with text refuse it.
    """

    def __init__(self, visual):
        super().__init__()
        self.visual = visual

    def encode_image(self, images):
        """Normalised images (B,3,R,R) -> the class token's features (B,D)."""
        return self.visual(images)


def require_text(clip, method):
    """Raises ValueError if the weights that `method` shall use have no text tower."""
    if isinstance(clip, VisionOnly):
        raise ValueError(f"{method} compares videos with text, and these weights have no text "
                         "tower; ILA with num_classes runs on them")


def from_timm(state):
    """A state_dict of timm's ViT -> {OpenAI's key: tensor}; the classifier's head is left out."""
    tower = {}
    for key, value in state.items():
        if key.startswith(("head.", "pre_logits.")):
            continue
        if key in ("cls_token", "pos_embed"):
            value = value.squeeze(0)  # (n,D), n = 1 or N
        for theirs, ours in TIMM_NAMES:
            key = re.sub(theirs, ours, key)
        tower[f"visual.{key}"] = value.squeeze(0) if key == "class_embedding" else value
    return tower


def from_google(state):
    """The arrays of Google's ViT .npz as tensors -> {OpenAI's key: tensor}, without the head.

    Its kernels are stored as (in, out): (p,p,3,D) for patches, (D,H,d) for queries, keys and
    values, (H,d,D) for their output.
    """
    tower = {"visual.class_embedding": state["cls"].flatten(),
             "visual.positional_embedding": state["Transformer/posembed_input/pos_embedding"][0],
             "visual.conv1.weight": state["embedding/kernel"].permute(3, 2, 0, 1),
             "visual.conv1.bias": state["embedding/bias"],
             "visual.ln_post.weight": state["Transformer/encoder_norm/scale"],
             "visual.ln_post.bias": state["Transformer/encoder_norm/bias"]}
    layers = len({key.split("/")[1] for key in state if "/encoderblock_" in key})
    for i in range(layers):
        theirs, ours = f"Transformer/encoderblock_{i}/", f"visual.transformer.resblocks.{i}."
        attention = theirs + "MultiHeadDotProductAttention_1/"
        parts = ("query", "key", "value")
        weights = [state[f"{attention}{part}/kernel"].flatten(1).T for part in parts]  # (D,D) each
        biases = [state[f"{attention}{part}/bias"].flatten() for part in parts]  # (D,) each
        tower[ours + "attn.in_proj_weight"] = torch.cat(weights)
        tower[ours + "attn.in_proj_bias"] = torch.cat(biases)
        tower[ours + "attn.out_proj.weight"] = state[attention + "out/kernel"].flatten(0, 1).T
        tower[ours + "attn.out_proj.bias"] = state[attention + "out/bias"]
        for name, norm in (("ln_1", "LayerNorm_0"), ("ln_2", "LayerNorm_2")):
            tower[f"{ours}{name}.weight"] = state[f"{theirs}{norm}/scale"]
            tower[f"{ours}{name}.bias"] = state[f"{theirs}{norm}/bias"]
        for name, dense in (("c_fc", "Dense_0"), ("c_proj", "Dense_1")):
            tower[f"{ours}mlp.{name}.weight"] = state[f"{theirs}MlpBlock_3/{dense}/kernel"].T
            tower[f"{ours}mlp.{name}.bias"] = state[f"{theirs}MlpBlock_3/{dense}/bias"]
    return {key: value.contiguous() for key, value in tower.items()}


def vision_sizes(state):
    """The image tower's arguments of CLIP(...), read off the shapes of OpenAI's keys."""
    prefix = "visual.transformer.resblocks."
    needed = ("visual.conv1.weight", "visual.positional_embedding", prefix + "0.mlp.c_fc.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(f"not the weights of an image tower: no {', '.join(missing)}")
    width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
    layers = len({key.split(".")[3] for key in state if key.startswith(prefix)})
    return dict(resolution=grid * patch, patch=patch, vision_width=width, vision_layers=layers,
                vision_mlp_width=state[prefix + "0.mlp.c_fc.weight"].shape[0])


def has_no_text(state):
    """Whether a state_dict is an image tower only, in timm's, Google's or OpenAI's layout."""
    if "patch_embed.proj.weight" in state or "embedding/kernel" in state:
        return True
    return len(state) > 0 and all(key.startswith("visual.") for key in state)


def vision_only(state, activation=None, head_width=None):
    """VisionOnly from a state_dict that has_no_text, loaded strictly.

    A tower without ln_pre is an image classifier's: exact GELU and eps 1e-6; otherwise CLIP's.
    """
    if "embedding/kernel" in state:
        query = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
        try:
            state, head_width = from_google(state), state[query].shape[2]
        except KeyError as error:
            raise ValueError(f"not a ViT in Google's layout: no {error}") from error
    elif "patch_embed.proj.weight" in state:
        state = from_timm(state)
    sizes = vision_sizes(state)
    width = sizes["vision_width"]
    from_clip = "visual.ln_pre.weight" in state
    eps = 1e-5 if from_clip else 1e-6
    activation = activation or ("quick_gelu" if from_clip else "gelu")
    embed = state["visual.proj"].shape[1] if "visual.proj" in state else None
    with torch.device("meta"):  # no memory, no random numbers: each tensor comes from the state
        blocks = [Block(width, sizes["vision_mlp_width"], known_head_width(width, head_width),
                        activation, eps) for _ in range(sizes["vision_layers"])]
        tower = VisionOnly(VisionTransformer(
            sizes["resolution"], sizes["patch"], width, embed, blocks,
            patch_bias="visual.conv1.bias" in state, pre_norm=from_clip, eps=eps))
    tower.load_state_dict(state, assign=True)
    return tower


# ---- what the video models share -----------------------------------------------------------------

def knob(default, help):
    """A setting in a configuration dataclass: its default, and the words that --help has for it."""
    return field(default=default, metadata={"help": help})


def split_capitals(name):
    """[released] A space before every capital A-Z, then runs of spaces become one.

    "ApplyEyeMakeup" -> "Apply Eye Makeup".
    """
    return re.sub(" +", " ", re.sub("([A-Z])", r" \1", name)).strip()


def cosine_logits(video, text, logit_scale):
    """exp(s) cos(video, text): video (B,E), text (C,E) or (B,C,E) -> logits (B,C).

    [ours] Under autocast it is computed in float32: 16 bits would round logits of 16 to 32 to steps
    of 1/8, and classes would tie.
    """
    device = video.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        video = video.to(torch.promote_types(video.dtype, torch.float32))
        text = text.to(torch.promote_types(text.dtype, torch.float32))
        with torch.autocast(device, enabled=False):
            return cosine_logits(video, text, logit_scale)
    video, text = F.normalize(video, dim=-1), F.normalize(text, dim=-1)
    if text.dim() == 2:
        return logit_scale.exp() * video @ text.T
    return logit_scale.exp() * (text @ video.unsqueeze(-1)).squeeze(-1)  # a text for each video


def class_tokens(clip, names, templates):
    """C class names, put into each of n templates such as "a video of {}." -> token ids (n,C,L).

    Raises ValueError if there is no template, or one without {}.
    """
    if not no_string(templates):
        raise ValueError("there are no prompt templates; give one, such as 'a video of {}.'")
    tokens = []
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"prompt {template!r:.100} has no {{}} for the class name")
        tokens.append(clip.tokenize([template.replace("{}", name) for name in no_string(names)]))
    return torch.stack(tokens)


def class_features(clip, tokens):
    """Token ids (n,C,L) of n templates -> class features (C,E).

    One template: its features, not normalised. Several: the mean of their normalised features
    (prompt ensembling, Radford et al. 2021, section 3.1.4).
    """
    features = [clip.encode_text(one) for one in tokens]  # n of (C,E)
    if len(features) == 1:
        return features[0]
    return torch.stack([F.normalize(one, dim=-1) for one in features]).mean(dim=0)


def full_precision(device):
    """A context without autocast: products keep the precision of their factors. A device's type."""
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def autocast_state():
    """The current autocast dtypes, False if off; part of the cache key."""
    return [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
            for kind in ("cuda", "cpu")]


class TextCache(nn.Module):
    """Keeps what the text tower computed for a class set, as long as no weight has changed.

    It computes anew in training and while gradients are on: whoever fine-tunes in eval mode gets
    gradients for the text too. Being a module, it notices train(), load_state_dict() and moves of
    device or dtype. It cannot notice weights that are changed in place while gradients are off
    (`parameter.data.copy_()`, an optimiser's step between two evaluations): call drop() after that.
    """

    def __init__(self, clip):
        super().__init__()
        self.value = self.made_under = None
        for module in (self, clip):
            module.register_load_state_dict_pre_hook(self.drop)

    def drop(self, *_):
        """Forgets the kept value."""
        self.value = None

    def keep(self, value):
        self.value, self.made_under = value, autocast_state()

    def train(self, mode=True):
        self.drop()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self.drop()
        return super()._apply(fn, recurse)

    @torch.compiler.disable  # a graph cannot keep a value between calls or cut texts to length
    def forward(self, compute, frozen=False):
        """compute(), or what it gave before. `frozen`: no text weight trains, so keep it always.

        torch.export takes the kept value as a constant. Raises ValueError if there is none then.
        """
        if torch.compiler.is_exporting():
            if self.value is None:
                raise ValueError("the text is not computed yet: before torch.export run the model "
                                 "once, in eval mode and under torch.no_grad()")
            return self.value
        if not frozen and (self.training or torch.is_grad_enabled()):
            self.drop()  # the weights are likely to change now
            return compute()
        if self.value is None or self.made_under != autocast_state():
            with torch.inference_mode(False), torch.no_grad():  # a tensor that autograd may use
                self.keep(compute())
        return self.value


# ---- frame pooling -------------------------------------------------------------------------------

@dataclass(frozen=True)
class PoolConfig:
    """The setting of frame pooling."""

    prompt: str = knob("a photo of a", "the words before the class name")


class FramePool(nn.Module):
    """ViFi-CLIP (Rasheed et al. 2023): the frames' features are averaged over time and compared
    with the text "a photo of a {name}.". It cannot see the order of frames.

    encode_video and encode_names are the way to embed; their cosine is the similarity.
    """

    def __init__(self, clip, config=PoolConfig()):
        super().__init__()
        require_text(clip, "frame pooling")
        self.clip, self.config = clip, config
        self.text_cache = TextCache(clip)
        self.register_buffer("tokens", None, persistent=False)  # (n,C,L) of n templates
        clip.token_embedding.requires_grad_(False)  # [released] the only CLIP tensor not trained

    def set_classes(self, names, templates=None):
        """Sets the classes. Names are as in the dataset's files; underscores stay [released].

        `templates` are strings such as "a video of {}.", in place of the configured prompt.
        """
        self.tokens = self.name_tokens(names, templates)
        self.text_cache.drop()

    def name_tokens(self, names, templates=None):
        """C names, n templates -> token ids (n,C,L)."""
        if templates is None:
            templates = [self.config.prompt + " {}."]
        names = [split_capitals(name) for name in no_string(names)]
        return class_tokens(self.clip, names, templates)

    def encode_video(self, video):
        """Normalised video (B,T,3,R,R) -> its frames' mean feature (B,E), not normalised."""
        frames = self.clip.encode_image(video.flatten(0, 1))  # (B*T,E)
        return frames.unflatten(0, video.shape[:2]).mean(dim=1)

    def encode_names(self, names, video=None, templates=None):
        """C class names -> their texts' features (C,E), not normalised; no video changes them."""
        return class_features(self.clip, self.name_tokens(names, templates))

    def class_text(self):
        """Features of the classes that were set (C,E), not normalised."""
        return class_features(self.clip, self.tokens)

    def forward(self, video):
        """Normalised video (B,T,3,R,R) -> logits (B,C), and the auxiliary loss 0."""
        if self.tokens is None:
            raise ValueError("no classes yet: call set_classes(names) first")
        text = self.text_cache(self.class_text)  # (C,E)
        logits = cosine_logits(self.encode_video(video), text, self.clip.logit_scale)
        return logits, logits.new_zeros(())


# ---- weights from disk, nothing of which is ever executed ------------------------------------------------------------

class Foreign(type):
    """Metaclass of the classes that stand in for unknown ones: instances are inert, and calling one is refused.

    A pickle rebuilds an *object* with cls.__new__, which is harmless here, but *calls* a function through
    type.__call__: that is what a hostile file needs, so it ends here.
    """

    def __call__(cls, *args, **kwargs):
        raise pickle.UnpicklingError(f"calls {cls.__name__}")


INERT = {  # what a pickle does to an object once it is there: set its state, fill it as a dict or a list
    "__setstate__": lambda self, state: setattr(self, "state", state),
    "__setitem__": lambda self, key, value: None, "append": lambda self, value: None}


class WeightsUnpickler(pickle.Unpickler):
    """Reads tensors and plain containers out of a zip archive of torch.save or torch.jit.save; imports nothing.

    Other classes (an old config object, TorchScript's modules) become inert stand-ins with their attributes.
    """

    def __init__(self, archive):
        names = archive.namelist()
        self.archive, self.top = archive, next(n for n in names if n.endswith("/data.pkl"))[:-len("data.pkl")]
        super().__init__(io.BytesIO(archive.read(self.top + "data.pkl")))

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name.endswith("Storage"):
            return {"Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64,
                    "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32,
                    "Long": torch.int64, "Bool": torch.bool}[name[:-len("Storage")]]
        if module == "collections" and name in ("OrderedDict", "defaultdict"):
            return lambda *args: OrderedDict()
        if module == "torch.jit._pickle":  # build_intlist and the like: lists of numbers, restored as they are
            return lambda value, *_: value
        stand_in = Foreign(f"{module}.{name}", (), dict(INERT))
        if module.startswith(("numpy", "_codecs")):  # a numpy number beside the weights: its parts are calls, made inert
            return lambda *args: stand_in.__new__(stand_in)
        return stand_in

    def persistent_load(self, pid):
        _, dtype, key, _, _ = pid
        data = bytearray(self.archive.read(f"{self.top}data/{key}"))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def module_tensors(module, prefix=""):
    """{name: tensor} of a TorchScript module read by WeightsUnpickler: its attributes, walked by name."""
    tensors = {}
    for name, value in module.state.items():
        if isinstance(value, torch.Tensor):
            tensors[prefix + name] = value
        elif isinstance(type(value), Foreign) and isinstance(getattr(value, "state", None), dict):
            tensors |= module_tensors(value, f"{prefix}{name}.")
    return tensors


def read_checkpoint(path):
    """What a file of torch.save or torch.jit.save holds, on the CPU; a TorchScript archive gives its state_dict.

    torch.load(weights_only=True) reads plain files. The archives that it refuses (OpenAI's TorchScript; released
    TC-CLIP files with a config object beside the weights) are read by WeightsUnpickler. Raises ValueError naming the file.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if any(name.endswith(".npy") for name in names):  # Google's ViTs
            with np.load(path, allow_pickle=False) as arrays:
                return {key: torch.from_numpy(arrays[key]) for key in arrays}
        if not any(name.endswith("/constants.pkl") or "/code/" in name for name in names):  # not TorchScript
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                if not names:
                    raise
        with zipfile.ZipFile(path) as archive:
            content = WeightsUnpickler(archive).load()
        return module_tensors(content) if isinstance(type(content), Foreign) else content
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, LookupError, TypeError, ValueError,
            AttributeError, StopIteration, OSError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split()).partition('. ')[0]:.160}"
        raise ValueError(f"{path}: refused, as it is damaged, no checkpoint, or one that needs code to be run ({reason})"
                         ) from error


def cached(url, sha256, folder=None):
    """Path of a file in OpenAI's own cache folder ~/.cache/clip; downloaded, resumed and checked if it is not there."""
    folder = Path(folder or Path.home() / ".cache" / "clip")
    target = folder / url.rsplit("/", 1)[-1]
    if target.is_file():
        return target
    advice = f"download {url} by hand and put it at {target}"
    part = target.with_name(target.name + ".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as reply:
            resumed = reply.status == 206
            total = int(reply.headers["Content-Length"] or 0) + (have if resumed else 0)
            with open(part, "ab" if resumed else "wb") as file, tqdm(
                    desc=target.name, total=total or None, initial=have if resumed else 0, unit="B",
                    unit_scale=True) as bar:
                while block := reply.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
                if file.tell() < total:
                    raise OSError(f"broken off at {file.tell()} of {total} bytes")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the part is complete already, and only its check is left
            raise ValueError(f"cannot download {target.name} ({error}); {advice}") from error
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"cannot download {target.name} ({error}); run again to resume, or {advice}") from error
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        part.unlink()
        raise ValueError(f"{url} has SHA-256 {found[:12]}..., not {sha256[:12]}...: removed; try again, or {advice}")
    os.replace(part, target)
    return target


def clip_weights(checkpoint):
    """The CLIP state_dict inside a checkpoint: plain, under "model" or "state_dict", or one of ours (keys "clip.*")."""
    for key in ("model", "state_dict"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, dict) or not all(isinstance(key, str) for key in checkpoint):
        raise ValueError(f"not a state_dict of named tensors but a {type(checkpoint).__name__}")
    if any(key.startswith("clip.") for key in checkpoint):
        checkpoint = {key[5:]: value for key, value in checkpoint.items() if key.startswith("clip.")}
    facts = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI's archives hold as tensors
    return {key: value for key, value in checkpoint.items() if key not in facts}


def sizes_of(state):
    """The arguments of CLIP(...), read off the tensors' shapes."""
    if "visual.layer1.0.conv1.weight" in state:
        raise ValueError("these weights are a ResNet CLIP; only the ViT models can be used: " + ", ".join(OPENAI_MODELS))
    needed = ("visual.conv1.weight", "visual.positional_embedding", "text_projection", "positional_embedding",
              "token_embedding.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(f"not CLIP weights: no {', '.join(missing)}")
    layers = {prefix: len({key.split(".")[depth] for key in state if key.startswith(prefix)})
              for prefix, depth in (("visual.transformer.resblocks.", 3), ("transformer.resblocks.", 2))}
    vision_width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
    text_width, embed = state["text_projection"].shape
    if vision_width % HEAD_WIDTH or text_width % HEAD_WIDTH:
        raise ValueError(f"widths {vision_width} and {text_width} must be multiples of the head width {HEAD_WIDTH}")
    return dict(embed=embed, resolution=grid * patch, patch=patch, vision_width=vision_width,
                vision_layers=layers["visual.transformer.resblocks."], text_length=state["positional_embedding"].shape[0],
                vocabulary=state["token_embedding.weight"].shape[0], text_width=text_width,
                text_layers=layers["transformer.resblocks."])


def load_clip(source, merges=None, activation=None, head_width=None):
    """CLIP from an OpenAI name, a file, or a state_dict of tensors or numpy arrays, loaded strictly; in eval mode.

    fp16 becomes float32; float32 and float64 stay. `merges`: path of the BPE merges, where they are not in the cache
    folder. Raises ValueError that names the file, the missing and the unknown keys.
    """
    name = ""
    if isinstance(source, (str, os.PathLike)):
        if str(source) in OPENAI_MODELS:
            sha256, file = OPENAI_MODELS[str(source)]
            source = cached(OPENAI.format(sha256=sha256, file=file), sha256)
        elif not Path(source).is_file():
            raise ValueError(f"{source}: neither a file nor one of {', '.join(OPENAI_MODELS)}")
        name, source = f"{source}: ", read_checkpoint(source)
    try:
        state = {key: torch.as_tensor(np.asarray(value) if not torch.is_tensor(value) else value).detach().clone()
                 for key, value in clip_weights(source).items()}
        state = {key: value.float() if value.dtype == torch.float16 else value for key, value in state.items()}
        if has_no_text(state):
            return vision_only(state, activation, head_width).eval()
        with torch.device("meta"):  # no memory, no random draws: every tensor comes from the state_dict
            clip = CLIP(**sizes_of(state))
        clip.load_state_dict(state, assign=True)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(name + " ".join(str(error).split())) from error
    clip.merges = merges
    return clip.eval()
