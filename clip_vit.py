"""CLIP (Radford et al. 2021), the image and text towers that every method here starts from, and frame pooling.

    image -> patches -> pre-norm transformer -> class token -> joint space
    text  -> tokens  -> the same, causal     -> end token   -> joint space, where cosines are compared

Parameter names are the keys of OpenAI's state_dict, so that weights load strictly and without a rename table; every
size is read off the tensors. FramePool is ViFi-CLIP (Rasheed et al. 2023): the mean over a video's frames.

Letters, here and in every file: B videos, T frames, P patches, N = 1 + P tokens of a frame, D width, E joint width,
H heads of width d = 64, C classes, L text length, R image side in pixels.
"""

import gzip
import hashlib
import html
import http.client
import io
import math
import os
import pickle
import re
import urllib.error
import urllib.request
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

HEAD_WIDTH = 64  # OpenAI's ViT towers have width // 64 heads; no tensor's shape tells it
OPENAI = "https://openaipublic.azureedge.net/clip/models/{sha256}/{file}"
OPENAI_MODELS = {  # name: (SHA-256, file), https://github.com/openai/CLIP/blob/main/clip/clip.py
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}
MERGES_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
BYTES = 514  # ids of a vocabulary without merges: 256 bytes, the same at a word's end, start and end token


# ---- the towers ------------------------------------------------------------------------------------------------------

class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the GELU approximation that CLIP was trained with."""

    def forward(self, x):
        # as silu(1.702 x) / 1.702, silu(z) = z sigmoid(z): a third faster, half as much kept for the backward pass, and
        # without one computed in place, twice as fast again
        return F.silu(1.702 * x, inplace=not torch.is_grad_enabled()).div_(1.702)


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(d)) v, under the parameter names of nn.MultiheadAttention; in steps,
    because the video methods put other keys and values in between."""

    def __init__(self, width):
        super().__init__()
        self.heads = width // HEAD_WIDTH
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
        return x.unflatten(-1, (self.heads, HEAD_WIDTH)).transpose(-2, -3)  # (..., H, n, d)

    def project_out(self, heads):
        """(..., H, n, d) -> (..., n, D)."""
        return self.out_proj(heads.transpose(-2, -3).flatten(-2))

    def forward(self, x_q, x_kv, causal=False):
        """Queries from x_q (..., n, D), keys and values from x_kv (..., m, D) -> (..., n, D)."""
        k, v = self.keys_values(x_kv)
        return self.project_out(F.scaled_dot_product_attention(self.queries(x_q), k, v, is_causal=causal))


class Block(nn.Module):
    """Pre-norm transformer block: x + Attn(LN_1 x, LN_1 [x; extra]), then x + MLP(LN_2 x)."""

    def __init__(self, width):
        super().__init__()
        self.checkpointing = False
        self.attn = Attention(width)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, causal=False, rows=slice(None), extra=None):
        """x (..., n, D) -> its `rows`, exactly; no others are computed. `extra` (..., m, D) are keys and values."""
        return self.run(self.compute, x, causal, rows, extra)

    def run(self, work, *inputs):
        """work(*inputs), this block's part of a model. With `checkpointing`, training keeps the inputs alone and computes
        what else the gradient needs once more in the backward pass."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(work, *inputs, use_reentrant=False)
        return work(*inputs)

    def compute(self, x, causal, rows, extra):
        y = self.ln_1(x)
        y_kv = y if extra is None else torch.cat([y, self.ln_1(extra)], dim=-2)  # (..., n+m, D)
        x = x[..., rows, :] + self.attn(y[..., rows, :], y_kv, causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks; exists for the sake of OpenAI's key names, `transformer.resblocks.{i}`."""

    def __init__(self, width, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(layers))


class VisionTransformer(nn.Module):
    """CLIP's image tower."""

    def __init__(self, resolution, patch, width, layers, embed):
        super().__init__()
        self.resolution = resolution
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((resolution // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, embed))

    def tokens(self, images):
        """Class token and patches, without positions yet: (B,3,R,R) -> (B,N,D)."""
        if images.shape[-2:] != (self.resolution, self.resolution):
            raise ValueError(f"images are {tuple(images.shape[-2:])} pixels; these weights need {self.resolution}")
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B,P,D)
        return torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], dim=1)

    def forward(self, images):
        """(B,3,R,R) -> (B,E). The last block computes the class row alone: no other row is used after it."""
        x = self.ln_pre(self.tokens(images) + self.positional_embedding)  # (B,N,D)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x)
        x = last(x, rows=slice(0, 1))[:, 0]  # (B,D)
        return self.ln_post(x) @ self.proj


class CLIP(nn.Module):
    """Both towers. Build it with `load_clip`, which reads the sizes off the weights."""

    def __init__(self, *, embed, resolution, patch, vision_width, vision_layers, context, vocabulary, text_width,
                 text_layers):
        super().__init__()
        self.merges = None  # path of the BPE merges; None: OpenAI's file in the cache folder
        self.visual = VisionTransformer(resolution, patch, vision_width, vision_layers, embed)
        self.transformer = Transformer(text_width, text_layers)
        self.token_embedding = nn.Embedding(vocabulary, text_width)
        self.positional_embedding = nn.Parameter(torch.zeros(context, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.zeros(text_width, embed))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, images):
        """Normalised images (B,3,R,R) -> features (B,E), not normalised."""
        return self.visual(images)

    def encode_text(self, tokens):
        """Token ids (C,L) -> features (C,E), not normalised; read at the end token, which has the largest id."""
        end = tokens.argmax(dim=-1)  # (C,)
        tokens = tokens[:, :int(end.max()) + 1]  # causal: nothing behind the longest end can matter [ours, exact]
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]  # (C,L,D)
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
        return self.ln_final(x[torch.arange(len(x), device=x.device), end]) @ self.text_projection

    def tokenize(self, texts, length=None):
        """C strings -> (C,length) int64 on the weights' device, in this model's own vocabulary."""
        length = length or len(self.positional_embedding)
        ids = tokenize(texts, length, self.merges, self.token_embedding.num_embeddings)
        return ids.to(self.positional_embedding.device)


# ---- what the video models share, and frame pooling ------------------------------------------------------------------

def split_capitals(name):
    """[released] A space before every capital A-Z, runs of spaces collapsed: "ApplyEyeMakeup" -> "Apply Eye Makeup"."""
    return re.sub(" +", " ", re.sub("([A-Z])", r" \1", name)).strip()


def cosine_logits(video, text, logit_scale):
    """exp(s) cos(video, text): video (B,E), text (C,E) or (B,C,E) -> logits (B,C)."""
    video, text = F.normalize(video, dim=-1), F.normalize(text, dim=-1)
    if text.dim() == 2:
        return logit_scale.exp() * video @ text.T
    return logit_scale.exp() * (text @ video.unsqueeze(-1)).squeeze(-1)  # each video has its own text


def autocast_state():
    """Under which autocast things are computed now; what is kept from one must not be used under another."""
    return [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cuda", "cpu")]


class TextCache(nn.Module):
    """Keeps what the text tower computed for a class set, for as long as no weight can have changed. A module, because
    then train(), load_state_dict() and moves of device or dtype reach it by themselves."""

    def __init__(self, clip):
        super().__init__()
        self.value = self.made_under = None
        for module in (self, clip):
            module.register_load_state_dict_pre_hook(self.drop)

    def drop(self, *_):
        self.value = None

    def keep(self, value):
        self.value, self.made_under = value, autocast_state()

    def train(self, mode=True):
        self.drop()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self.drop()
        return super()._apply(fn, recurse)

    @torch.compiler.disable  # what keeps a value between calls, and cuts texts to length, is nothing for a graph
    def forward(self, compute, changing):
        """compute() while weights are `changing`, as in training; else what its first call gave, without gradient."""
        if changing:
            return compute()
        if self.value is None or self.made_under != autocast_state():
            with torch.inference_mode(False), torch.no_grad():  # an ordinary tensor, usable under autograd too
                self.keep(compute())
        return self.value


@dataclass(frozen=True)
class PoolConfig:
    """What frame pooling leaves open."""

    prompt: str = "a photo of a"  # stands before the class name


class FramePool(nn.Module):
    """ViFi-CLIP: frame features are averaged over time, then compared with "a photo of a {name}."; blind to order."""

    def __init__(self, clip, config=PoolConfig()):
        super().__init__()
        self.clip, self.config = clip, config
        self.text_cache = TextCache(clip)
        self.register_buffer("tokens", None, persistent=False)
        clip.token_embedding.requires_grad_(False)  # [released] the one CLIP tensor that is not trained

    def set_classes(self, names):
        """Class names as in the dataset's files; underscores stay [released]."""
        names = map(split_capitals, no_string(names))
        self.tokens = self.clip.tokenize([f"{self.config.prompt} {name}." for name in names])  # (C,L)
        self.text_cache.drop()

    def encode_video(self, video):
        """Normalised video (B,T,3,R,R) -> its feature (B,E), the mean of its frames'; not normalised."""
        return self.clip.encode_image(video.flatten(0, 1)).unflatten(0, video.shape[:2]).mean(dim=1)

    def forward(self, video):
        """Normalised video (B,T,3,R,R) -> logits (B,C), and the auxiliary loss 0."""
        if self.tokens is None:
            raise ValueError("no classes yet: call set_classes(names) first")
        text = self.text_cache(lambda: self.clip.encode_text(self.tokens), changing=self.training)  # (C,E)
        logits = cosine_logits(self.encode_video(video), text, self.clip.logit_scale)
        return logits, logits.new_zeros(())


# ---- the tokenizer ---------------------------------------------------------------------------------------------------

# OpenAI's pattern in the standard library's `re`: contractions, runs of letters, single digits, runs of anything else.
# The white space is Unicode's, spelled out: Python's \s also holds U+001C-1F, which must count as punctuation.
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
CONTROL = re.compile(r"\x1b\[[\d;]*[a-zA-Z]|[\x00-\x08\x0b\x0e-\x1f\x7f]")  # what ftfy, which OpenAI uses, removes of ASCII
WORD = re.compile(rf"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^{SPACE}\w]|_)+")


@lru_cache
def byte_symbols():
    """The printable character that stands for each of the 256 bytes, in the order of the vocabulary's first 256 ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


@lru_cache
def read_vocabulary(path, size):
    """Symbols and merges of a vocabulary of `size` ids: {symbol: id}, {pair: rank}. Without merges, BYTES ids."""
    symbols = list(byte_symbols().values())
    lines = gzip.decompress(Path(path).read_bytes()).decode().split("\n") if size > BYTES else []
    merges = [tuple(line.split()) for line in lines[1:1 + size - BYTES]]  # line 0 is a header
    symbols += [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    if len(symbols) != size or any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{path}: no BPE merges for a vocabulary of {size}; get the file from {MERGES_URL}")
    return {s: i for i, s in enumerate(symbols)}, {pair: rank for rank, pair in enumerate(merges)}


def byte_pair_encode(word, ranks):
    """Splits one word into symbols by joining, again and again, the adjacent pair of lowest rank."""
    parts = [byte_symbols()[byte] for byte in word.encode()]
    parts[-1] += "</w>"
    while len(parts) > 1:
        best = min(zip(parts, parts[1:]), key=lambda pair: ranks.get(pair, math.inf))
        if best not in ranks:
            break
        joined, i = [], 0
        while i < len(parts):
            step = 2 if tuple(parts[i:i + 2]) == best else 1
            joined.append("".join(parts[i:i + step]))
            i += step
        parts = joined
    return parts


def no_string(texts):
    """The texts themselves. Raises ValueError where one string stands in for a list of them."""
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of strings; got the string {texts!r}")
    return texts


def tokenize(texts, length=77, merges=None, vocabulary=49408):
    """C strings -> (C,length) int64: start token, byte-pair ids, end token, zeros.

    `merges` is the path of bpe_simple_vocab_16e6.txt.gz (default: the cache folder, downloaded once). Raises
    ValueError where a text needs more than `length` tokens.
    """
    if not len(no_string(texts)):
        raise ValueError("there are no texts (class names) to tokenize")
    path = merges or (cached(MERGES_URL, MERGES_SHA256) if vocabulary > BYTES else None)
    ids, ranks = read_vocabulary(path, vocabulary)
    tokens = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(tokens, texts):
        clean = html.unescape(html.unescape(CONTROL.sub("", text))).strip()
        clean = re.sub(f"[{SPACE}]+", " ", clean).strip().lower()
        parts = [p for word in WORD.findall(clean) for p in ([word] if word in ids and word.startswith("<|")
                                                             else byte_pair_encode(word, ranks))]
        line = [ids[part] for part in ["<|startoftext|>", *parts, "<|endoftext|>"]]
        if len(line) > length:
            raise ValueError(f"text of {len(line)} tokens does not fit in {length}: {text!r}; shorten it, or in "
                             "TC-CLIP's training raise text_length")
        row[:len(line)] = torch.tensor(line)
    return tokens


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
                vision_layers=layers["visual.transformer.resblocks."], context=state["positional_embedding"].shape[0],
                vocabulary=state["token_embedding.weight"].shape[0], text_width=text_width,
                text_layers=layers["transformer.resblocks."])


def load_clip(source, merges=None):
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
        with torch.device("meta"):  # no memory, no random draws: every tensor comes from the state_dict
            clip = CLIP(**sizes_of(state))
        clip.load_state_dict(state, assign=True)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(name + " ".join(str(error).split())) from error
    clip.merges = merges
    return clip.eval()
