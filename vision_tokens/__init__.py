"""Fewer visual tokens: drop, merge or frequency-compress them before the language model reads them."""

from typing import TYPE_CHECKING

from mmaccel.lazy import lazy_exports

if TYPE_CHECKING:
    from vision_tokens.aim import AIM as AIM
    from vision_tokens.baselines import PooledTokens as PooledTokens
    from vision_tokens.baselines import RandomTokens as RandomTokens
    from vision_tokens.baselines import UniformTokens as UniformTokens
    from vision_tokens.cache_methods import CacheMethod as CacheMethod
    from vision_tokens.cache_methods import Eviction as Eviction
    from vision_tokens.decoder_layers import DecoderMethod as DecoderMethod
    from vision_tokens.dynamic_llava import DynamicLLaVA as DynamicLLaVA
    from vision_tokens.fastv import FastV as FastV
    from vision_tokens.fourier_vlm import FourierVLM as FourierVLM
    from vision_tokens.hired import HiRED as HiRED
    from vision_tokens.language_input import LanguageInputMethod as LanguageInputMethod
    from vision_tokens.language_input import MergingMethod as MergingMethod
    from vision_tokens.language_input import QuestionMethod as QuestionMethod
    from vision_tokens.language_input import ResamplingMethod as ResamplingMethod
    from vision_tokens.language_input import SelectingMethod as SelectingMethod
    from vision_tokens.layer_view import LayerView as LayerView
    from vision_tokens.layout import ImageView as ImageView
    from vision_tokens.layout import Layout as Layout
    from vision_tokens.layout import Merged as Merged
    from vision_tokens.output_gate import OutputGate as OutputGate
    from vision_tokens.prefix_kv import PrefixKV as PrefixKV
    from vision_tokens.prumerge import PruMerge as PruMerge
    from vision_tokens.pyramid_drop import PyramidDrop as PyramidDrop
    from vision_tokens.quecc import QueCC as QueCC
    from vision_tokens.shortv import ShortV as ShortV
    from vision_tokens.sparsevlm import SparseVLM as SparseVLM
    from vision_tokens.tome import ToMe as ToMe
    from vision_tokens.visionzip import VisionZip as VisionZip

_HOMES = {
    "AIM": "aim",
    "CacheMethod": "cache_methods",
    "DecoderMethod": "decoder_layers",
    "DynamicLLaVA": "dynamic_llava",
    "Eviction": "cache_methods",
    "FastV": "fastv",
    "FourierVLM": "fourier_vlm",
    "HiRED": "hired",
    "ImageView": "layout",
    "LanguageInputMethod": "language_input",
    "LayerView": "layer_view",
    "Layout": "layout",
    "Merged": "layout",
    "MergingMethod": "language_input",
    "OutputGate": "output_gate",
    "PooledTokens": "baselines",
    "PrefixKV": "prefix_kv",
    "PruMerge": "prumerge",
    "PyramidDrop": "pyramid_drop",
    "QueCC": "quecc",
    "QuestionMethod": "language_input",
    "RandomTokens": "baselines",
    "ResamplingMethod": "language_input",
    "SelectingMethod": "language_input",
    "ShortV": "shortv",
    "SparseVLM": "sparsevlm",
    "ToMe": "tome",
    "UniformTokens": "baselines",
    "VisionZip": "visionzip",
}
__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
