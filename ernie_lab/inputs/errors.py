"""What can be wrong with text on its way into the model."""


class TokenizerError(ValueError):
    """Tokenizer files that are damaged, contradict each other, or cannot be honoured exactly."""


class ChatTemplateError(ValueError):
    """A chat that is malformed, or a template that fails on it."""


class PromptError(ValueError):
    """A prompt of no known form, or one that needs a tokenizer that is not there."""


class BatchError(ValueError):
    """Token ids that cannot be put into one batch."""


class ImageError(ValueError):
    """A picture that cannot be read, or that the model cannot take as it is."""


class VideoError(ValueError):
    """A clip that cannot be decoded, sampled or stamped with its times."""
