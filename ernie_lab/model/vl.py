"""The vision-language model: tower, resampler, and a decoder with two banks of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import embedding

from ernie_lab.checkpoint.config import VisualIds, VLConfig
from ernie_lab.inputs.media import Grid
from ernie_lab.inputs.visual_layout import PositionRule, VisualLayout, visual_layout
from ernie_lab.model.banks import BankedMoE, BankRows
from ernie_lab.model.block import Block, BlockSites
from ernie_lab.model.cache import KVCache
from ernie_lab.model.linear import linear
from ernie_lab.model.losses import next_token_loss
from ernie_lab.model.norm import NormSites, RMSNorm
from ernie_lab.model.resampler import Resampler, ResamplerSites
from ernie_lab.model.rope import rotation_3d
from ernie_lab.model.router import Router
from ernie_lab.model.stack import (
    Hidden,
    ModelOutput,
    block_list,
    cache_for,
    kept_positions,
    new_mask,
    require_tokens,
    run_blocks,
    visible,
)
from ernie_lab.model.vision import VisionSites, VisionTower
from ernie_lab.sites import Site, Tap, idle


@dataclass(frozen=True, slots=True)
class VLSites:
    """`vision` and `resampler` fire in forwards with pictures alone."""

    embed: Site
    vision: VisionSites
    resampler: ResamplerSites
    embed_in: Site
    blocks: tuple[BlockSites, ...]
    final_norm: NormSites
    logits: Site


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """All images and clips of a batch, in reading order: packed patches `[p q]`, and grids."""

    patches_PQ: Tensor
    grids: tuple[Grid, ...]


class VLModel(nn.Module):
    """ERNIE 4.5 VL: images and clips become tokens, which have experts of their own.

    Building it allocates and does not initialise: `load` fills every parameter exactly once,
    `initialise` draws random ones. Nothing of a run stays on the model: positions after a
    picture are kept with the cache.
    """

    def __init__(self, config: VLConfig) -> None:
        super().__init__()
        text = config.text
        self.config = config
        self.embed_VD = nn.Parameter(torch.empty(text.vocab_size, text.width))
        self.vision = VisionTower(config.vision)
        self.resampler = Resampler(config)
        blocks = [Block(config, layer) for layer in range(text.n_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = RMSNorm(text.width, text.norm_eps)
        self.unembed_VD = (
            None if text.tied else nn.Parameter(torch.empty(text.vocab_size, text.width))
        )
        self.sites = VLSites(
            embed=Site("embed", "b s d", "token embeddings, placeholders included"),
            vision=self.vision.sites,
            resampler=self.resampler.sites,
            embed_in=Site("embed_in", "b s d", "the same with pictures in place: enters block 0"),
            blocks=tuple(block.sites for block in blocks),
            final_norm=NormSites.under("final_norm"),
            logits=Site("logits", "b s v", "next-token logits"),
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        output_router_logits: bool = False,
        logits_to_keep: int | Tensor = 0,
        *,
        positions: PositionRule = "reference",
        bank: Tensor | None = None,
        tap: Tap = idle,
    ) -> ModelOutput:
        """Arguments and conventions of transformers' `Ernie4_5_VLMoeForConditionalGeneration`.

        It needs no token types: these follow from `input_ids`. (transformers sends every token
        to the text experts when they are left out.)

        Args:
            input_ids: `[b s]`; or `inputs_embeds` `[b s d]` with pictures already in place, and
                then `bank` too, since embeddings do not tell.
            attention_mask: `[b t]` with t = past + s, 1 on real tokens; padding on either side.
            position_ids: `[b s]`, or (time, height, width) as `[b s 3]` or transformers'
                `[3 b s]`. Made from ids and grids when absent, and continued from the cache.
            pixel_values: `[p, channels * patch^2]`, patches of all images; their grids in
                `image_grid_thw` `[n 3]` (frames, rows, columns of patches). Clips likewise.
            labels: `[b s]`; -100 is not counted. Shifted here, so pass the input ids.
            output_router_logits: compute the auxiliary losses and, with labels, add
                coefficient x `aux_loss_transformers` to `loss`, as transformers does.
            logits_to_keep: the last n positions, or a tensor of positions; 0 keeps all.
            positions: `"transformers"` for its rule after clips longer than wide.
            bank: `[b s]`, 0 text and 1 vision, in place of what the ids say.
            tap: sees, and may replace, the value at every site.

        Raises:
            BatchError: pictures and placeholders that do not match, with both counts.
        """
        images = _pictures("pixel_values", pixel_values, "image_grid_thw", image_grid_thw)
        videos = _pictures(
            "pixel_values_videos", pixel_values_videos, "video_grid_thw", video_grid_thw
        )
        layout = pictures = None
        if input_ids is not None and (past_key_values is None or past_key_values.length == 0):
            layout = visual_layout(
                input_ids,
                self.config.ids,
                images.grids if images else (),
                videos.grids if videos else (),
                attention_mask,
                positions,
            )
            pictures = _in_reading_order(layout, images, videos)
        elif images or videos:
            raise ValueError(
                "pictures came with a filled cache or with inputs_embeds; pass them with the "
                "input_ids that hold their placeholders, in the first call"
            )
        hidden = self.trunk(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            tap,
            layout=layout,
            pictures=pictures,
            bank=bank,
        )
        logits_BSV = self.unembed(kept_positions(hidden.normed_BSD, logits_to_keep), tap)
        loss = None if labels is None else next_token_loss(logits_BSV, labels)
        aux = aux_transformers = None
        if output_router_logits:
            assert self.config.text.moe is not None
            aux, aux_transformers = hidden.aux_losses(), hidden.aux_loss_transformers()
            if loss is not None:
                loss = loss + self.config.text.moe.aux_loss_coef * aux_transformers
        hidden.commit()
        return ModelOutput(logits_BSV, loss, aux, aux_transformers, hidden.cache)

    def trunk(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        tap: Tap = idle,
        *,
        layout: VisualLayout | None = None,
        pictures: Pictures | None = None,
        bank: Tensor | None = None,
    ) -> Hidden:
        """Everything but the unembedding. What it wrote to the cache counts after `commit()`.

        `layout` says where the pictures of `pictures` go, which bank each token takes, and the
        positions. Without it (decoding) all tokens are text, whatever their ids: a delimiter
        that the model generates is read by text experts, as in every engine (ernie-facts 3.4).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None and (bank is None or position_ids is None):
            raise ValueError(
                "inputs_embeds do not say which tokens are pictures: pass bank= [b s] (0 text, "
                "1 vision) and position_ids= [b s 3] with them"
            )
        tokens_BSD = inputs_embeds if input_ids is None else embedding(input_ids, self.embed_VD)
        assert tokens_BSD is not None
        require_tokens(tokens_BSD)
        cache = cache_for(past_key_values, use_cache, self.config.text.n_layers)
        n_past, n_new = 0 if cache is None else cache.length, tokens_BSD.shape[1]
        mask_BS = new_mask(attention_mask, n_new)
        bank_BS = _bank(bank, layout, tokens_BSD)
        if layout is None and bank is None and n_new > 1:
            _require_no_placeholders(input_ids, self.config.ids)
        positions_BSR = _three(_positions(position_ids, layout, cache, mask_BS, tokens_BSD), n_new)
        visible_BST = visible(attention_mask, n_past, n_new)

        tokens_BSD = tap(self.sites.embed, tokens_BSD)
        if pictures is not None:
            assert layout is not None
            features_MD = self.features(pictures.patches_PQ, pictures.grids, tap)
            tokens_BSD = placed(tokens_BSD, features_MD, layout)
        resid_BSD = tap(self.sites.embed_in, tokens_BSD)
        text = self.config.text
        rope = rotation_3d(text.rope, text.attention.head_dim, positions_BSR)
        resid_BSD, routings = run_blocks(
            block_list(self.blocks), resid_BSD, rope, visible_BST, BankRows.of(bank_BS), cache, tap
        )
        normed_BSD = self.final_norm(resid_BSD, self.sites.final_norm, tap)
        after_B = positions_BSR.amax((1, 2)) + 1
        next_B = layout.next_position_B if layout is not None and position_ids is None else after_B
        return Hidden(normed_BSD, routings, mask_BS, cache, next_B)

    def features(self, patches_PQ: Tensor, grids: Sequence[Grid], tap: Tap = idle) -> Tensor:
        """Tower and resampler: `[p q]` to `[m d]`, images and clips one behind the other."""
        vision_PW = self.vision(patches_PQ, grids, tap)
        features_MD: Tensor = self.resampler(vision_PW, grids, tap)
        return features_MD

    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor
    ) -> tuple[Tensor, ...]:
        """The embeddings `[m d]` of each image, as they replace its placeholders."""
        images = _pictures("pixel_values", pixel_values, "image_grid_thw", image_grid_thw)
        return self._features_of_each(images)

    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor
    ) -> tuple[Tensor, ...]:
        """The embeddings `[m d]` of each clip: pairs of frames, rows, columns."""
        videos = _pictures(
            "pixel_values_videos", pixel_values_videos, "video_grid_thw", video_grid_thw
        )
        return self._features_of_each(videos)

    def _features_of_each(self, pictures: Pictures | None) -> tuple[Tensor, ...]:
        assert pictures is not None
        features_MD = self.features(pictures.patches_PQ, pictures.grids)
        return torch.split(features_MD, [grid.n_tokens for grid in pictures.grids])

    def routers(self) -> dict[str, dict[int, Router]]:
        """By bank, the router of every mixture layer, by layer number."""
        mixtures = {
            block.layer: block.moe
            for block in block_list(self.blocks)
            if isinstance(block.moe, BankedMoE)
        }
        return {
            "text": {layer: moe.text.router for layer, moe in mixtures.items()},
            "vision": {layer: moe.vision.router for layer, moe in mixtures.items()},
        }

    def unembed(self, normed_BSD: Tensor, tap: Tap = idle) -> Tensor:
        weight_VD = self.embed_VD if self.unembed_VD is None else self.unembed_VD
        return tap(self.sites.logits, linear(normed_BSD, weight_VD))


def placed(tokens_BSD: Tensor, features_MD: Tensor, layout: VisualLayout) -> Tensor:
    """The token embeddings with every placeholder replaced by its picture's feature."""
    is_picture_BS = layout.modality_BS != 0
    where = is_picture_BS.nonzero(as_tuple=True)
    return tokens_BSD.index_put(where, features_MD.to(tokens_BSD.dtype))


def _positions(
    position_ids: Tensor | None,
    layout: VisualLayout | None,
    cache: KVCache | None,
    mask_BS: Tensor | None,
    tokens_BSD: Tensor,
) -> Tensor:
    """As given, else as the layout says, else counted on from where the cache ended."""
    if position_ids is not None:
        return position_ids
    if layout is not None:
        return layout.positions_BSR
    ones_BS = tokens_BSD.new_ones(tokens_BSD.shape[:2], dtype=torch.int64)
    counted_BS = (ones_BS if mask_BS is None else mask_BS.long()).cumsum(1) - 1
    if cache is not None and cache.next_position_B is not None:
        counted_BS = counted_BS + cache.next_position_B[:, None]
    return counted_BS.clamp(min=0)


def _three(positions: Tensor, n_new: int) -> Tensor:
    """`[b s 3]`: as given, or of `[b s]`, the same on all axes, or of transformers' `[3 b s]`."""
    shape = tuple(positions.shape)
    ours = len(shape) == 3 and shape[1:] == (n_new, 3)
    theirs = len(shape) == 3 and (shape[0], shape[2]) == (3, n_new)
    if ours and theirs:
        raise ValueError(
            "position_ids of shape (3, 3, 3) may be [b s 3] or [3 b s]; run the sequences apart"
        )
    if ours:
        return positions
    if theirs:
        return rearrange(positions, "r b s -> b s r")
    if len(shape) == 2 and shape[1] == n_new:
        return repeat(positions, "b s -> b s r", r=3)
    raise ValueError(
        f"position_ids have shape {shape}, expected [b s], [b s 3] or [3 b s] with s={n_new}"
    )


def _bank(given_BS: Tensor | None, layout: VisualLayout | None, tokens_BSD: Tensor) -> Tensor:
    """`[b s]` as given, else as the layout says, else all text."""
    if given_BS is None:
        text_BS = tokens_BSD.new_zeros(tokens_BSD.shape[:2], dtype=torch.int64)
        return text_BS if layout is None else layout.bank_BS
    if given_BS.shape != tokens_BSD.shape[:2]:
        raise ValueError(
            f"bank has shape {tuple(given_BS.shape)}, expected {tuple(tokens_BSD.shape[:2])}: one "
            "value for each token"
        )
    # A token of another number would go to no bank at all.
    if bool(((given_BS != 0) & (given_BS != 1)).any()):
        found = sorted(set(given_BS.flatten().tolist()))
        raise ValueError(
            f"bank holds {found[:5]}, expected 0 (text) and 1 (vision, images and clips alike)"
        )
    return given_BS.long()


def eye(model: VLModel) -> list[tuple[str, nn.Parameter]]:
    """The parameters of the tower and the resampler, which turn pictures into tokens."""
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name.startswith(("vision.", "resampler."))
    ]


def _require_no_placeholders(input_ids: Tensor | None, ids: VisualIds) -> None:
    """One such token may be the model's own choice; a chunk of a prompt has lost its pictures."""
    if input_ids is None:
        return
    found = int(((input_ids == ids.image) | (input_ids == ids.video)).sum())
    if found:
        raise ValueError(
            f"{found} placeholders of pictures came with a filled cache, where they would be read "
            "as text; pass them with their pictures in the first call, or pass bank= [b s]"
        )


def _pictures(
    pixels_name: str, pixels_PQ: Tensor | None, grid_name: str, grids: Tensor | None
) -> Pictures | None:
    if pixels_PQ is None and grids is None:
        return None
    if pixels_PQ is None or grids is None:
        given, missing = (grid_name, pixels_name) if pixels_PQ is None else (pixels_name, grid_name)
        raise ValueError(f"{given} was given without {missing}; pass both, from one processor")
    if grids.ndim != 2 or grids.shape[1] != 3:
        raise ValueError(
            f"{grid_name} has shape {tuple(grids.shape)}, expected [n 3]: frames, rows and "
            "columns of patches"
        )
    return Pictures(pixels_PQ, tuple(Grid(*map(int, grid)) for grid in grids.tolist()))


def _in_reading_order(
    layout: VisualLayout, images: Pictures | None, videos: Pictures | None
) -> Pictures | None:
    """Images and clips as their placeholders follow each other in the batch."""
    given = {"image": images, "video": videos}
    parts = {
        kind: pictures.patches_PQ.split([grid.n_patches for grid in pictures.grids])
        for kind, pictures in given.items()
        if pictures is not None
    }
    if not layout.blocks:
        return None
    patches = [parts[block.kind][block.media] for block in layout.blocks]
    return Pictures(torch.cat(patches), tuple(block.grid for block in layout.blocks))
