"""CLIP (Radford et al. 2021): the image and text towers that every method here starts from.

    image -> patches -> pre-norm transformer -> class token -> joint space
    text  -> tokens  -> the same, causal     -> end token   -> joint space: cosines are compared

Sections: downloads; tokenizer; towers; what the video models share; frame pooling; weights from
disk. A reader who wants the models begins with the towers and ends with frame pooling.

Parameter names are the keys of OpenAI's state_dict, so weights load strictly and need no table of
names. All sizes are read off the tensors; what no tensor tells (activation, head width) is an
argument of the towers.

Letters, here and in every file: B videos, T frames, P patches, N = 1 + P tokens of a frame,
D width, E joint width, H heads of width d, C classes, L text length, R image side in pixels.
"""

import contextlib
import errno
import gzip
import html
import html.entities
import http.client
import io
import json
import math
import os
import pickletools
import re
import socket
import struct
import time
import unicodedata
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

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


# ---- downloads -----------------------------------------------------------------------------------

TIMEOUT = 60  # seconds without an answer end a download


def cache_folder():
    """OpenAI's own cache folder, ~/.cache/clip."""
    try:
        return Path.home() / ".cache" / "clip"
    except RuntimeError as error:
        raise ValueError("there is no home folder for downloads: set HOME, or give files, "
                         "--clip FILE --merges FILE") from error


def cached(url, sha256, folder=None):
    """Path of a file in the cache folder, which is downloaded and checked if it is not there.

    Downloads go to a file of their own, which then takes the name: several processes do not meet.
    Raises ValueError that says what went wrong and what to do by hand.
    """
    folder = Path(folder or cache_folder())
    target = folder / url.rsplit("/", 1)[-1]
    if os.path.isfile(target):  # False where it may not be looked at
        return target
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(f"{target.name}.*.partial"):
            if time.time() - partial.stat().st_mtime > 24 * 3600:  # of a download that was killed
                partial.unlink(missing_ok=True)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=sha256)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        flag = "--merges" if url == MERGES_URL else "--clip"
        raise ValueError(f"cannot download {target.name} ({error!s:.60}): get it by hand "
                         f"from {url} and give {flag} FILE") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return target


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
            raise ValueError(f"text of {len(parts)} tokens does not fit in {length}: "
                             f"{text!r:.100}; shorten it")
        row[:len(parts)] = torch.tensor([ids[part] for part in parts])
    return tokens


# ---- towers --------------------------------------------------------------------------------------

class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x):
        # x sigmoid(1.702 x) = silu(1.702 x) / 1.702, which is faster and stores half as much for
        # backward; without gradients it runs in place
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
    """Pre-norm transformer block: x + Attn(LN_1 x, LN_1 x), then x + MLP(LN_2 x).

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

        `extra` (..., m, D) are tokens that are only looked at: LN_1 [x; extra] gives the keys and
        values (ILA's aligned features). A causal block needs rows from 0 and no extra, since its
        mask takes the first query and the first key for the same token.
        """
        assert not causal or (rows.start in (None, 0) and rows.step is None and extra is None)
        return self.checkpointed(self.compute, x, causal, rows, extra)

    def checkpointed(self, work, *inputs):
        """work(*inputs), the part of a model around this block. While `checkpointing` is on,
        training stores only the inputs and recomputes the rest in backward; else a plain call."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(work, *inputs, use_reentrant=False)
        return work(*inputs)

    def compute(self, x, causal, rows, extra):
        y = y_kv = self.ln_1(x)  # (..., n, D)
        if extra is not None:
            y_kv = torch.cat([y, self.ln_1(extra)], dim=-2)  # (..., n+m, D)
        x = x[..., rows, :] + self.attn(y[..., rows, :], y_kv, causal)
        return self.add_mlp(x)

    def add_mlp(self, x):
        """x + MLP(LN_2 x)."""
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
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]  # (C,L,W)
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
        x = x[torch.arange(len(x), device=x.device), end]  # (C,W)
        return self.ln_final(x) @ self.text_projection

    def tokenize(self, texts, length=None):
        """C strings -> (C,length) int64 in this model's vocabulary, on its weights' device."""
        length = length or len(self.positional_embedding)
        ids = tokenize(texts, length, self.merges, self.token_embedding.num_embeddings)
        return ids.to(self.positional_embedding.device)


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


# ---- what the video models share -----------------------------------------------------------------

def knob(default, help):
    """A setting in a configuration dataclass: its default, and the words that --help has for it."""
    return field(default=default, metadata={"help": help})


def split_capitals(name):
    """[released] A space before every capital A-Z, then runs of spaces become one.

    "ApplyEyeMakeup" -> "Apply Eye Makeup".
    """
    return re.sub(" +", " ", re.sub("([A-Z])", r" \1", name)).strip()


def at_least_float32(x):
    """fp16 and bf16 as fp32; fp32 and fp64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(device):
    """A context in which products keep the precision of their factors, whatever the autocast."""
    kind = "cpu" if device.type == "meta" else device.type  # shapes without values have no autocast
    return torch.autocast(kind, enabled=False)


def cosine_logits(video, text, logit_scale):
    """exp(logit_scale) cos(video, text): video (B,E), text (C,E) or (B,C,E) -> logits (B,C).

    [ours] Under autocast it is computed in float32: bf16 would round logits between 16 and 32 to
    steps of 1/8, and classes would tie.
    """
    if not video.is_meta and torch.is_autocast_enabled(video.device.type):
        with full_precision(video.device):
            return cosine_logits(at_least_float32(video), at_least_float32(text), logit_scale)
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
        self.once = None  # a TextOnce within an optimiser step that shares its text
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
            return compute() if self.once is None else self.once.text(compute)
        if self.value is None or self.made_under != autocast_state():
            with torch.inference_mode(False), torch.no_grad():  # a tensor that autograd may use
                self.keep(compute())
        return self.value


class TextOnce:
    """The text of an optimiser step, computed once for all of its micro-batches. [ours, exact]

    Plainly, each micro-batch computes the text and its backward pass goes through the text tower.
    But within a step no weight changes. So the micro-batches before the last take the text's values
    as leaves, in which their gradients add up; the last one takes the text itself and ends with

        backward([loss, text], [1, sum of the leaves' gradients])

    This may be skipped at first reading; tests/test_text_once.py compares the gradients. It is one
    call because TC-CLIP uses its last text block twice, for the classes and for each video: two
    calls would give its weights two gradients, and DDP would send only the first. The text's graph
    is kept from the first micro-batch to the last.
    """

    def __init__(self):
        self.last = True  # whether this micro-batch is the step's last
        self.made = None  # the text, a tensor or a named tuple of tensors
        self.leaves = []  # a leaf for each of its tensors

    def tensors(self):
        """The text's tensors as a list."""
        return [self.made] if torch.is_tensor(self.made) else list(self.made)

    def text(self, compute):
        """compute() for the last micro-batch; for the others leaves that have its values."""
        if self.made is None:
            self.made = compute()
            for tensor in self.tensors():
                leaf = at_least_float32(tensor.detach())  # for exact sums
                self.leaves.append(leaf.requires_grad_(tensor.requires_grad))
        if self.last:
            return self.made
        given = [leaf.to(tensor.dtype) for leaf, tensor in zip(self.leaves, self.tensors())]
        return given[0] if torch.is_tensor(self.made) else self.made._make(given)

    def backward(self, loss):
        """The backward pass of this micro-batch; the last one's ends the step."""
        outputs, gradients = [loss], [None]
        if self.last and self.made is not None:
            for tensor, leaf in zip(self.tensors(), self.leaves):
                if leaf.grad is not None:
                    outputs.append(tensor)
                    gradients.append(leaf.grad.to(tensor.dtype))
        torch.autograd.backward(outputs, gradients)


@contextlib.contextmanager
def text_once(model):
    """The context of an optimiser step whose micro-batches share the text; gives a TextOnce.

    Set its `last` before each forward pass and call its `backward(loss)` afterwards.
    """
    once = TextOnce()
    caches = [module for module in model.modules() if isinstance(module, TextCache)]
    for cache in caches:
        cache.once = once
    try:
        yield once
    finally:
        for cache in caches:
            cache.once = None


# ---- frame pooling -------------------------------------------------------------------------------

@dataclass(frozen=True)
class PoolConfig:
    """The setting of frame pooling."""

    prompt: str = knob("a photo of a", "the words before the class name")


class FramePool(nn.Module):
    """ViFi-CLIP (Rasheed et al. 2023): the frames' features are averaged over time and compared
    with the text "a photo of a {name}.". It cannot see the order of frames.

    It shows what the scripts need of a method: `clip` and `config`; set_classes(names); forward,
    video (B,T,3,R,R) -> logits (B,C) and an auxiliary loss; encode_video, video -> (B,E), and
    encode_names, names -> (C,E) or with a video (B,C,E), whose cosine is the similarity. It may
    have set_epoch(epoch), which is called before every epoch of training.
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


# ---- weights from disk ---------------------------------------------------------------------------
# Nothing that is read here is ever executed: PickleReader imports nothing and calls nothing. What
# a file claims about itself is bounded by its size. A format is a row of FORMATS.

TORCH_TYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool}
SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool}
MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before version 1.6
MOST_PICKLE = 2**23  # bytes of a pickle, tensors apart; released checkpoints have under 2**19
MOST_UNPACKED = 2  # bytes of an archive's records per byte of the file; torch does not compress
MOST_SHARED = 4  # bytes of all tensors per byte of the file; some share their storage
MOST_NAMES = 100_000  # of tensors in a file; the largest released one has 1715
MOST_DEPTH = 30  # modules inside modules
MOST_LAYERS = 200  # blocks of a tower; the largest CLIP has 48
DAMAGE = (ArithmeticError, AttributeError, EOFError, LookupError, NotImplementedError, RuntimeError,
          TypeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error)  # raised by readers

DAMAGED = "refused: damaged, or no checkpoint ({})"
MOST_LINE = 290  # characters of a message

# What PickleReader pushes on its stack, by the opcode's name.
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE",
            "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
            "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONTAINERS = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
KEYS = (str, int, float, bytes, type(None))  # a dict's keys; others could nest without end
# What the calls in a pickle stand for, by the function's name.
EMPTY_DICTS = {"collections.OrderedDict", "collections.defaultdict"}
TENSORS = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"}
FIRST_ARGUMENT = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
                  "torch.Size", "builtins.set", "builtins.frozenset", "__builtin__.set",
                  "__builtin__.frozenset"}
ATTACKS = ("os", "posix", "nt", "subprocess", "sys", "shutil", "runpy", "importlib", "socket",
           "pty", "ctypes", "webbrowser", "commands", "pickle", "builtins.eval", "builtins.exec",
           "builtins.open", "builtins.__import__", "builtins.compile", "__builtin__.eval",
           "__builtin__.exec", "__builtin__.open", "__builtin__.__import__", "__builtin__.compile",
           "__builtin__.execfile")


@contextlib.contextmanager
def naming(source):
    """A ValueError raised within it begins with the name of what could not be read, in one line."""
    try:
        yield
    except ValueError as error:
        message, name = " ".join(str(error).split()), str(source)
        if len(name) > MOST_LINE // 2:
            name = f"...{name[-MOST_LINE // 2:]}"
        if name:
            message = f"{name}: {message}"
        raise ValueError(message[:MOST_LINE]) from error


class Foreign:
    """Stands for a class, an object of it, or the result of a call that a pickle names. Inert."""

    def __init__(self, name):
        self.name, self.state = name, None


class PickleReader:
    """Interprets a pickle, one opcode after the other. It imports nothing and calls nothing.

    Numbers, text, tuples, lists, dicts and tensors come out as they are, sets as lists, everything
    else as a Foreign. `storage` turns a persistent id into a flat tensor.
    """

    def __init__(self, storage=None):
        self.storage = storage
        self.stack, self.marks, self.memo = [], [], {}

    def read(self, source):
        """The object in a pickle: bytes, or a BytesIO, which is read up to the pickle's end."""
        for opcode, argument, position in pickletools.genops(source):
            if position > MOST_PICKLE:
                raise ValueError(f"its pickle has more than {MOST_PICKLE} bytes")
            if opcode.name in LITERALS:
                self.stack.append(argument)
            elif opcode.name in CONSTANTS:
                self.stack.append(CONSTANTS[opcode.name])
            elif opcode.name in CONTAINERS:
                self.stack.append(CONTAINERS[opcode.name]())
            else:
                self.step(opcode.name, argument)
        return self.stack.pop()

    def step(self, opcode, argument):
        """An opcode that does more than push."""
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "TUPLE" | "FROZENSET":
                self.stack.append(tuple(self.above_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self.take(int(opcode[-1]))))
            case "APPEND" | "SETITEM":
                self.fill(self.take(1 if opcode == "APPEND" else 2))
            case "APPENDS" | "SETITEMS" | "ADDITEMS":
                self.fill(self.above_mark())
            case "GLOBAL":
                self.stack.append(Foreign(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                self.stack.append(Foreign(".".join(self.take(2))))
            case "NEWOBJ" | "REDUCE":
                function, arguments = self.take(2)
                self.stack.append(call(function.name, arguments))
            case "BUILD":
                self.set_state(*self.take(1))
            case "BINPERSID":
                self.stack.append(self.storage(*self.take(1)))
            case _:
                raise ValueError(f"its pickle has the opcode {opcode}")

    def take(self, count):
        """Removes the last `count` objects from the stack and returns them."""
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def above_mark(self):
        """The same for all objects above the last mark."""
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return taken

    def fill(self, values):
        """Puts values into the container on top of the stack; a Foreign stays empty."""
        container = self.stack[-1]
        if isinstance(container, list):
            container += values
        elif isinstance(container, dict):
            for key, value in zip(values[::2], values[1::2]):
                if isinstance(key, KEYS):
                    container[key] = value

    def set_state(self, state):
        """Keeps the attributes of a Foreign on top of the stack; those of a dict are dropped."""
        if isinstance(self.stack[-1], Foreign):
            self.stack[-1].state = state


def call(function, arguments):
    """What a function's call stands for; a Foreign if the function is not known here.

    Raises ValueError if it would run a command: only a hostile pickle asks for that.
    """
    if function in EMPTY_DICTS:
        return {}
    if function in TENSORS:
        return view(*arguments[:4])
    if function in FIRST_ARGUMENT or function.startswith("torch.jit._pickle."):
        return arguments[0]
    if function == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes
        return call(arguments[0].name, arguments[2])
    if function in ATTACKS or function.split(".")[0] in ATTACKS:
        raise ValueError(f"it wants to run {function:.60}, which no checkpoint needs")
    return Foreign(function)


def view(storage, offset, size, stride):
    """A tensor that views flat storage and is no larger than it."""
    if math.prod(size) > len(storage):
        raise ValueError("a tensor is larger than its storage")
    return storage.as_strided(size, stride, offset)


def empty_bytes(count):
    """Uninitialised memory for `count` bytes, a uint8 tensor."""
    try:
        return torch.empty(count, dtype=torch.uint8)
    except RuntimeError as error:
        raise MemoryError(f"cannot allocate {count} bytes") from error


def storage_type(kind):
    """torch.FloatStorage, a Foreign -> torch.float32."""
    name = kind.name.removeprefix("torch.").removesuffix("Storage")
    if name not in TORCH_TYPES:
        raise ValueError(f"tensors of {kind.name:.60} cannot be read")
    return TORCH_TYPES[name]


# ---- weights from disk: one reader for each kind of file

def module_tensors(root):
    """{name: tensor} of a TorchScript module read by PickleReader: its attributes by name."""
    tensors, waiting, visited = {}, [("", root)], 0
    while waiting:
        prefix, module = waiting.pop()
        visited += 1
        if visited > MOST_NAMES or prefix.count(".") > MOST_DEPTH:
            raise ValueError("its modules nest without end")
        for name, value in module.state.items():
            if isinstance(value, torch.Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, Foreign) and isinstance(value.state, dict):
                waiting.append((f"{prefix}{name}.", value))
    return tensors


def read_archive(archive):
    """The object in a zip archive of torch.save or torch.jit.save; see read_checkpoint."""
    names = archive.namelist()
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if not pickles:
        raise ValueError("an archive without data.pkl")
    top = pickles[0].removesuffix("data.pkl")
    if f"{top}byteorder" in names and archive.read(f"{top}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    storages = {}

    def storage(persistent_id):
        _, kind, key, *_ = persistent_id
        if key not in storages:
            record = archive.read(f"{top}data/{key}")  # checks the CRC
            numbers = empty_bytes(len(record))
            numbers.numpy()[:] = np.frombuffer(record, np.uint8)
            storages[key] = numbers.view(storage_type(kind))
        return storages[key]

    content = PickleReader(storage).read(archive.read(f"{top}data.pkl"))
    if isinstance(content, Foreign) and content.name.startswith("__torch__."):
        return {"state_dict": module_tensors(content), "clip": {"activation": "quick_gelu"}}
    return content


def read_legacy(file, size):
    """The object in a file of torch.save before version 1.6: pickles, then the storages."""
    storages = {}

    def storage(persistent_id):
        _, kind, key, _, count, *_ = persistent_id
        if key not in storages:
            bytes_left = size - sum(numbers.nbytes for numbers in storages.values())
            nbytes = count * storage_type(kind).itemsize
            if not 0 <= nbytes <= bytes_left:
                raise ValueError("a tensor is larger than the file")
            storages[key] = empty_bytes(nbytes).view(storage_type(kind))
        return storages[key]

    pickles = io.BytesIO(file.read(MOST_PICKLE))
    magic, _, _ = [PickleReader().read(pickles) for _ in range(3)]  # magic, version, machine
    if magic != MAGIC:
        raise ValueError("not written by torch.save")
    content = PickleReader(storage).read(pickles)
    keys = PickleReader().read(pickles)
    file.seek(pickles.tell())
    for key in keys:
        numbers = storages[key].view(torch.uint8).numpy()
        file.seek(8, os.SEEK_CUR)  # the number of elements once more
        if file.readinto(numbers) != len(numbers):
            raise EOFError("the file is cut off")
    return content


def read_safetensors(file, size):
    """{name: tensor} of a .safetensors file: the header's length in 8 bytes, the header in JSON
    {name: {dtype, shape, data_offsets}}, the numbers."""
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError("its header is longer than the file")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors, total = {}, 0
    for name, entry in header.items():
        kind, (begin, end) = SAFETENSORS_TYPES[entry["dtype"]], entry["data_offsets"]
        total += end - begin
        fits = 0 <= begin <= end and total <= size - 8 - length
        if not fits or end - begin != math.prod(entry["shape"]) * kind.itemsize:
            raise ValueError(f"{name:.60} lies outside the file")
        numbers = empty_bytes(end - begin)
        file.seek(8 + length + begin)
        if file.readinto(numbers.numpy()) != end - begin:
            raise EOFError("the file is cut off")
        tensors[name] = numbers.view(kind).reshape(entry["shape"])
    return tensors


def read_arrays(archive, file):
    """{name: tensor} of a NumPy .npz."""
    for record in archive.infolist():
        with archive.open(record) as stored:
            np.lib.format.read_magic(stored)
            shape, _, kind = np.lib.format.read_array_header_1_0(stored)
        if math.prod(shape) * kind.itemsize > record.file_size:
            raise ValueError(f"{record.filename:.60} is larger than its record")
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def read_any(file):
    """The content of an open file by the kind of file that it is."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(9)
    file.seek(0)
    if head.startswith(b"version "):
        raise ValueError("it is a pointer of Git LFS; fetch the weights with `git lfs pull`")
    if head[8:] == b"{":
        return read_safetensors(file, size)
    if not head.startswith(b"PK"):
        return read_legacy(file, size)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if sum(record.file_size for record in records) > MOST_UNPACKED * size:
            raise ValueError("its records unpack to more than the file can hold")
        if all(record.filename.endswith(".npy") for record in records):
            return read_arrays(archive, file)
        return read_archive(archive)


def read_checkpoint(path):
    """What a file of torch.save, torch.jit.save, safetensors or NumPy holds, on the CPU.

    Only plain strided tensors; objects of unknown classes, such as a config, are inert Foreigns.
    A TorchScript archive, as only OpenAI's CLIPs are, gives its state_dict and activation. Raises
    ValueError that names a damaged file; what the system says about a file stays an OSError.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file, naming(path):
        try:
            return read_any(file)
        except MemoryError as error:
            raise MemoryError(f"cannot allocate the memory that {path} needs") from error
        except OSError as error:
            if error.errno != errno.EINVAL:  # a damaged archive points to a place before the file
                raise
            raise ValueError(DAMAGED.format("it points outside itself")) from error
        except DAMAGE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(DAMAGED.format(f"{reason:.120}")) from error


# ---- weights from disk: where they lie

FOLDER_FILES = (  # of a folder the first that is there
    "best.pt", "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin")


def find_weights(source):
    """Path of the file that an OpenAI name, a file or a folder stands for."""
    if str(source) in OPENAI_MODELS:
        sha256, file = OPENAI_MODELS[str(source)]
        return cached(OPENAI.format(sha256=sha256, file=file), sha256)
    path = Path(source)
    if path.is_dir():
        for name in FOLDER_FILES:
            if (path / name).is_file():
                return path / name
        below = sorted(found.parent for found in path.glob(f"*/{FOLDER_FILES[0]}"))
        advice = f"; there is {below[0]}" if below else ""
        raise ValueError(f"{source}: a folder without {', '.join(FOLDER_FILES)}{advice}")
    if not path.is_file():
        raise ValueError(f"{source}: no such file or folder, nor one of {', '.join(OPENAI_MODELS)}")
    return path


# ---- weights from disk: image towers without text

TIMM_NAMES = (  # timm's name as a regular expression, ours; applied in this order
    (r"^cls_token$", "class_embedding"), (r"^pos_embed$", "positional_embedding"),
    (r"^patch_embed\.proj\.", "conv1."), (r"^norm\.", "ln_post."),
    (r"^blocks\.", "transformer.resblocks."), (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"), (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.mlp\.fc2\.", ".mlp.c_proj."))


def check_fit(model, state):
    """Raises ValueError that names the first keys of a state_dict that are missing, unknown,
    misshapen or not finite."""
    own = model.state_dict()
    both = [key for key in own if key in state]
    problems = {
        "missing": [key for key in own if key not in state],
        "unknown": [key for key in state if key not in own],
        "of another shape": [key for key in both if own[key].shape != state[key].shape],
        "not finite": [key for key in both if not state[key].isfinite().all()]}
    found = []
    for problem, keys in problems.items():
        if keys:
            more = " ..." if len(keys) > 2 else ""
            found.append(f"{', '.join(keys[:2]):.100}{more} {problem}")
    if found:
        raise ValueError(f"the weights do not fit: {'; '.join(found)}")


def load_strictly(model, state):
    """Makes the tensors of a state_dict a model's own. Raises ValueError if they do not fit."""
    check_fit(model, state)
    model.load_state_dict(state, assign=True)


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
    return tower


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


GOOGLE_QUERY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"  # (D,H,d)


def vision_only(state, activation=None, head_width=None):
    """VisionOnly from a state_dict under OpenAI's keys, loaded strictly.

    A tower without ln_pre is an image classifier's: exact GELU and eps 1e-6; otherwise CLIP's.
    """
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
    load_strictly(tower, state)
    return tower


# ---- weights from disk: formats

WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "module")
PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")  # of DDP and torch.compile
TENSOR_LIKE = (torch.Tensor, np.ndarray, np.generic)
FACTS = ("activation", "head_width", "text_head_width")  # what no tensor tells
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")  # beside OpenAI's weights
OPEN_CLIP_KEYS = {  # what may stand in open_clip_config.json; the tensors tell most of it
    "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "image_size",
    "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout", "context_length",
    "vocab_size", "heads"}
HUGGING_FACE_NAMES = (  # theirs as a regular expression, ours; each key meets them in this order,
    # the tower first, then the part of a block
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # misspelled there
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.self_attn\.", ".attn."), (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.mlp\.fc2\.", ".mlp.c_proj."))


class Weights(NamedTuple):
    """What a file, a folder or a dict gave."""

    name: str  # for messages; empty for a dict
    content: object  # all that it holds
    facts: dict  # what it tells beside its tensors: activation, head_width, text_head_width
    folder: Path | None = None  # where a config may lie; None for a dict
    limit: float = math.inf  # bytes that its tensors may have

    @property
    def state(self):
        return state_dict_in(self.content, self.limit)


class Format(NamedTuple):
    """A layout of weights, known by a key that it has."""

    title: str
    mark: str  # a regular expression that finds one of its keys; the first row that does counts
    rename: Callable | None = None  # state_dict -> the same under OpenAI's keys; None: refused
    config: str = ""  # the JSON file beside it
    read_config: Callable | None = None  # what that says, sizes -> facts


def unwrap(content):
    """The dict that a training program put its weights in; `content` itself if there is none."""
    named = [content[key] for key in WRAPPERS if isinstance(content.get(key), dict)]
    if named:
        return named[0]
    inner = [value for value in content.values() if isinstance(value, dict)]
    only = len(inner) == 1 and not any(isinstance(v, torch.Tensor) for v in content.values())
    return inner[0] if only else content


def state_dict_in(content, limit=math.inf):
    """The {key: tensor} in a checkpoint, whatever a training program wrapped around it; arrays
    become tensors, and keys lose the "module." of DDP.

    `limit` is the largest sum of the tensors' bytes. Raises ValueError if there is none.
    """
    for _ in range(MOST_DEPTH):
        if isinstance(content, dict):
            content = unwrap(content)
    if isinstance(content, Foreign):
        raise ValueError(f"it holds a whole {content.name:.60}: save its state_dict() instead")
    if not isinstance(content, dict) or not content:
        raise ValueError(f"not a state_dict of named tensors but a {type(content).__name__}")
    state = {}
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, TENSOR_LIKE)):
            kind = value.name if isinstance(value, Foreign) else type(value).__name__
            raise ValueError(f"not a state_dict of named tensors: {key!r:.40} is a {kind:.60}")
        if key not in OPENAI_NUMBERS:
            state[PREFIX.sub("", key)] = torch.as_tensor(value)
    if len(state) > MOST_NAMES or sum(value.nbytes for value in state.values()) > limit:
        raise ValueError("its tensors have more numbers than the file can hold")
    return state


def open_weights(source):
    """The Weights in an OpenAI name, a file, a folder or a state_dict; Weights stay as they are."""
    if isinstance(source, Weights):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return Weights("", source, {})
    path = find_weights(source)
    content = read_checkpoint(path)
    told = content.get("clip") if isinstance(content, dict) else None
    facts = {}
    if isinstance(told, dict):
        facts = {name: told[name] for name in FACTS if name in told}
    return Weights(str(source), content, facts, path.parent, MOST_SHARED * os.path.getsize(path))


def from_ours(state):
    """A checkpoint of this project -> the CLIP in it; a linear probe's has "model." in front."""
    inner = {key.removeprefix("model."): value for key, value in state.items()}
    return {key.removeprefix("clip."): value for key, value in inner.items()
            if key.startswith("clip.")}


def join_projections(state):
    """Each attention's `q_proj`, `k_proj` and `v_proj` stacked, as `in_proj_weight`, `_bias`."""
    joined = {}
    for key, value in state.items():
        if ".q_proj." in key:
            parts = [state[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            joined[key.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            joined[key] = value
    return joined


def from_hugging_face(state):
    """The state_dict of a Hugging Face CLIPModel under OpenAI's keys."""
    ours = {}
    for key, value in state.items():
        if key.endswith(".position_ids"):
            continue  # 0, 1, 2, ..., as old versions saved them
        for theirs, name in HUGGING_FACE_NAMES:
            key = re.sub(theirs, name, key)
        ours[key] = value.T if key in ("visual.proj", "text_projection") else value
    return join_projections(ours)


def read_hugging_face_config(config, sizes):
    """What config.json tells of activation and heads. Values that it leaves out are the class's
    own; of old files the *_config_dict count [their library does it so]."""
    if config.get("model_type", "clip") != "clip":
        raise ValueError(f"it is a {config['model_type']!s:.40} model; only clip can be read")
    facts = {}
    for tower, heads, fact, width in (("vision", 12, "head_width", "vision_width"),
                                      ("text", 8, "text_head_width", "text_width")):
        given = config.get(f"{tower}_config_dict") or config.get(f"{tower}_config") or {}
        activation = given.get("hidden_act", "quick_gelu")
        if facts.setdefault("activation", activation) != activation:
            raise ValueError("its towers differ in hidden_act")
        if given.get("layer_norm_eps", 1e-5) != 1e-5:
            raise ValueError(f"its layer_norm_eps is {given['layer_norm_eps']!s:.20}, not 1e-05")
        facts[fact] = sizes[width] // given.get("num_attention_heads", heads)
    return facts


def read_open_clip_config(config, sizes):
    """What open_clip_config.json tells of activation and heads. Raises ValueError for settings
    that make other towers than CLIP's."""
    model = config.get("model_cfg", config)
    facts = {"activation": "quick_gelu" if model.get("quick_gelu") else "gelu"}
    vision, text = model["vision_cfg"], model["text_cfg"]
    settings = model | vision | text
    others = [key for key, value in settings.items() if value and key not in OPEN_CLIP_KEYS]
    if others:
        raise ValueError(f"its towers are not CLIP's: open_clip_config.json sets "
                         f"{', '.join(sorted(others)[:3]):.80}")
    facts["head_width"] = vision.get("head_width", HEAD_WIDTH)
    facts["text_head_width"] = sizes["text_width"] // text.get("heads", 8)
    return facts


FORMATS = (  # from the most special to CLIP's plain keys, which many others hold too
    Format("ours", r"^(model\.)?clip\.visual\.", from_ours),
    Format("prompted ViFi-CLIP", r"\.VPT"),
    Format("TC-CLIP", r"^text_encoder\.prompt_generation_layer\."),
    Format("prompted ViFi-CLIP", r"^prompt_learner\.ctx$"),
    Format("ViFi-CLIP", r"^image_encoder\."),
    Format("ILA", r"\.message_attn\.interactive_block\."),
    Format("X-CLIP", r"\.message_(attn|fc)\."),
    Format("EVL", r"^decoder\.decoder_layers\."),
    Format("TimeSformer", r"\.temporal_attn\."),
    Format("AIM", r"_Adapter\.D_fc"),
    Format("FROSTER", r"^(raw_model|projector_[vt])\."),
    Format("Open-VCLIP", r"^model\.visual\."),
    Format("MoTE", r"expert|\bmoe"),
    Format("ActionCLIP or BIKE", r"^fusion_model_state_dict$"),
    Format("Text4Vis", r"^fusion_model\."),
    Format("SigLIP", r"^logit_bias$|^vision_model\.head\.|^visual\.trunk\.attn_pool\."),
    Format("open_clip model with other towers", r"^visual\.trunk\.|^text\.|^visual\.blocks\."),
    Format("ResNet CLIP", r"^visual\.layer1\."),
    Format("ViT in timm's layout", r"^patch_embed\.proj\.weight$", from_timm),
    Format("ViT in Google's layout", r"^embedding/kernel$", from_google),
    Format("Hugging Face CLIP", r"^(text|vision)_model\.encoder\.", from_hugging_face,
           "config.json", read_hugging_face_config),
    Format("CLIP", "", dict, "open_clip_config.json", read_open_clip_config),
)
VIDEO_FORMATS = ("ViFi-CLIP", "TC-CLIP", "ILA", "EVL", "TimeSformer")  # eval.load_model reads them


def recognise(weights):
    """The Format of Weights."""
    keys = list(weights.state)
    if isinstance(weights.content, dict):
        keys += [key for key in weights.content if isinstance(key, str)]
    for row in FORMATS:
        if re.search(row.mark, "\n".join(keys), re.MULTILINE):
            return row


def refuse(row):
    """Raises ValueError for weights of a format that has no CLIP that can be used."""
    if row.title in VIDEO_FORMATS:
        raise ValueError(f"it is a {row.title} checkpoint and no CLIP: give it as --checkpoint")
    raise ValueError(f"it is a checkpoint of {row.title}, which this project does not run; it "
                     f"reads ViT CLIPs, {', '.join(VIDEO_FORMATS)} and its own")


def read_config(weights, row, sizes):
    """The facts in the JSON file beside Weights; none if it is not there."""
    path = weights.folder / row.config if weights.folder and row.config else None
    if path is None or not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error!s:.60})") from error
    try:
        return row.read_config(config, sizes)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not a config of {row.title} ({error!r:.60})") from error


def known_facts(weights, row, sizes, given):
    """Activation and head widths of both towers: as given, else as the file beside the weights or
    they themselves tell. Raises ValueError that asks for what nothing tells."""
    facts = {}
    miniature = sizes["vocabulary"] == BYTES and sizes["text_length"] < 77  # no other CLIP is so
    if row.title == "ours" or miniature or weights.folder is None:
        facts["activation"] = "quick_gelu"
    config = read_config(weights, row, sizes)
    facts |= weights.facts | config | given
    width = sizes["vision_width"]
    if "activation" not in facts:
        raise ValueError(f"no tensor tells the activation and no {row.config} lies beside: set "
                         "activation=quick_gelu (OpenAI, DFN, MetaCLIP) or activation=gelu (LAION, "
                         "DataComp and most others)")
    if facts["activation"] not in ACTIVATIONS:
        raise ValueError(f"its activation is {facts['activation']!r:.30}; only "
                         f"{' and '.join(ACTIVATIONS)} can be run")
    even = width == HEAD_WIDTH or width % (2 * HEAD_WIDTH) == 0  # as in all usual towers
    if weights.folder and row.title == "CLIP" and not even and "head_width" not in facts:
        raise ValueError(f"no tensor tells the head width of a tower {width} wide: set head_width")
    facts["head_width"] = known_head_width(width, facts.get("head_width"))
    for name in ("head_width", "text_head_width"):
        if not isinstance(facts.get(name, 1), int) or facts.get(name, 1) < 1:
            raise ValueError(f"{name} is {facts[name]!r:.20}; it must be a whole number above 0")
    return facts


def sizes_of(state):
    """The arguments of CLIP(...) that the tensors' shapes tell."""
    needed = ("visual.conv1.weight", "visual.positional_embedding", "text_projection",
              "positional_embedding", "token_embedding.weight",
              "transformer.resblocks.0.mlp.c_fc.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(f"not CLIP weights: no {', '.join(missing)}")
    text_width, embed = state["text_projection"].shape
    prefix = "transformer.resblocks."
    layers = len({key.split(".")[2] for key in state if key.startswith(prefix)})
    return vision_sizes(state) | dict(
        embed=embed, text_length=state["positional_embedding"].shape[0],
        vocabulary=state["token_embedding.weight"].shape[0], text_width=text_width,
        text_layers=layers, text_mlp_width=state[f"{prefix}0.mlp.c_fc.weight"].shape[0])


def own_tensor(key, value, dtype, copy):
    """A contiguous tensor for the model, of the kind `dtype`."""
    tensor = value.detach()
    if tensor.numel() == 0:
        raise ValueError(f"{key:.60} is empty")
    if not tensor.is_floating_point():
        raise ValueError(f"{key:.60} holds {tensor.dtype}, no weights")
    return tensor.to(dtype, copy=copy).contiguous()


def clip_facts(clip):
    """What no tensor of a model's CLIP tells, to be saved as "clip" beside its state_dict."""
    block = clip.visual.transformer.resblocks[0]
    facts = {"activation": "quick_gelu" if isinstance(block.mlp.gelu, QuickGELU) else "gelu",
             "head_width": block.attn.head_width}
    if not isinstance(clip, VisionOnly):
        facts["text_head_width"] = clip.transformer.resblocks[0].attn.head_width
    return facts


def load_clip(source, merges=None, activation=None, head_width=None):
    """CLIP, or an image tower without text, loaded strictly; in eval mode.

    `source` is an OpenAI name, a file, a folder (Hugging Face, open_clip, a run) or a state_dict of
    tensors or arrays. All become float32, or float64 if the patches' weights are. `merges`: path of
    the BPE merges, if not in the cache folder. `activation` (quick_gelu or gelu) and `head_width`
    are for files that do not tell them; a dict is taken for QuickGELU. Raises ValueError that says
    what is wrong.
    """
    weights = open_weights(source)
    given = {"activation": activation, "head_width": head_width}
    given = {name: value for name, value in given.items() if value}
    with naming(weights.name):
        row = recognise(weights)
        if row.rename is None:
            refuse(row)
        try:
            state = row.rename(weights.state)
        except KeyError as error:
            raise ValueError(f"not a {row.title}: no {error}") from error
        patches, copy = state.get("visual.conv1.weight"), not weights.folder
        double = patches is not None and patches.dtype == torch.float64
        dtype = torch.float64 if double else torch.float32
        state = {key: own_tensor(key, value, dtype, copy) for key, value in state.items()}
        if state and all(key.startswith("visual.") for key in state):
            facts = weights.facts | given
            if row.rename is from_google:
                facts["head_width"] = weights.state[GOOGLE_QUERY].shape[2]
            clip = vision_only(state, facts.get("activation"), facts.get("head_width"))
        else:
            sizes = sizes_of(state)
            facts = known_facts(weights, row, sizes, given)
            with torch.device("meta"):  # no memory, no random numbers: all tensors come from state
                clip = CLIP(**sizes, **facts)
            load_strictly(clip, state)
    clip.merges = merges
    return clip.eval()
