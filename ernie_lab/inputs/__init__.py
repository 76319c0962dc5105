"""Text, chats, ids and pictures to what the model reads, and ids back to text."""

from ernie_lab.inputs.batch import Batch, Visual, pad_batch, visual_columns
from ernie_lab.inputs.chat import render_chat
from ernie_lab.inputs.chat_templates import default_template, template_kind
from ernie_lab.inputs.errors import (
    BatchError,
    ChatTemplateError,
    ImageError,
    PromptError,
    TokenizerError,
    VideoError,
)
from ernie_lab.inputs.images import ImageLike, prepare_image, read_image
from ernie_lab.inputs.media import Box, Cell, Grid, Media
from ernie_lab.inputs.preprocessor import Preprocessor, SamplingRule, VideoRules
from ernie_lab.inputs.preprocessor_files import read_preprocessor
from ernie_lab.inputs.prompt import (
    EncodedPrompt,
    Prompt,
    encode_prompt,
    is_chat,
    is_single,
    read_prompt,
)
from ernie_lab.inputs.streaming import StreamDecoder
from ernie_lab.inputs.thinking import Thought, split_thinking
from ernie_lab.inputs.tokenizer import Tokenizer, load_tokenizer
from ernie_lab.inputs.videos import VideoLike, prepare_video
from ernie_lab.inputs.visual_layout import VisualLayout, visual_layout
from ernie_lab.inputs.visual_prompt import MediaReader, read_visual_prompt

__all__ = [
    "Batch",
    "BatchError",
    "Box",
    "Cell",
    "ChatTemplateError",
    "EncodedPrompt",
    "Grid",
    "ImageError",
    "ImageLike",
    "Media",
    "MediaReader",
    "Preprocessor",
    "Prompt",
    "PromptError",
    "SamplingRule",
    "StreamDecoder",
    "Thought",
    "Tokenizer",
    "TokenizerError",
    "VideoError",
    "VideoLike",
    "VideoRules",
    "Visual",
    "VisualLayout",
    "default_template",
    "encode_prompt",
    "is_chat",
    "is_single",
    "load_tokenizer",
    "pad_batch",
    "prepare_image",
    "prepare_video",
    "read_image",
    "read_preprocessor",
    "read_prompt",
    "read_visual_prompt",
    "render_chat",
    "split_thinking",
    "template_kind",
    "visual_columns",
    "visual_layout",
]
