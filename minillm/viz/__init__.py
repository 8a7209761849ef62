"""Pictures of masks, runs and measurements: each as plain text, as a figure and, where steps matter, as a stepper.

May import anything of minillm; only notebooks, checks and the command line import it. Text does not need matplotlib.
"""

from minillm.viz.base import (
    STYLE,
    Panels,
    Picture,
    PictureError,
    binary_bytes,
    both_bytes,
    decimal_bytes,
    plural,
    side_by_side,
    stacked,
    text_table,
)
from minillm.viz.batches import BatchComposition, PaddingRectangle, PaddingSteps
from minillm.viz.block_masks import BlockMaskSteps
from minillm.viz.block_replay import PoolState, pool_states
from minillm.viz.blocks import BlockTables, BlockTableSteps
from minillm.viz.curves import Bars, CacheGrowth, Curves
from minillm.viz.decode_tiles import DecodeTiles
from minillm.viz.diagrams import EngineDiagram, LayerDiagram
from minillm.viz.grids import AttentionWeights, CutMask, InfluenceGrid, MaskGrid
from minillm.viz.journey import LayerPath
from minillm.viz.lanes import DeviceUse, HostDeviceLanes, LaneChart, Span, device_use
from minillm.viz.launches import LaunchOverhead
from minillm.viz.links import AllReduceRounds, LinkRoofline
from minillm.viz.load import LoadCurves, LoadPoint, ThroughputLatency
from minillm.viz.memory_access import WarpAccess
from minillm.viz.memory_traffic import MemoryTraffic
from minillm.viz.overview import RunOverview
from minillm.viz.places import Places
from minillm.viz.policies import PolicyTimelines
from minillm.viz.pool import PoolUse, ReservedAgainstPaged
from minillm.viz.prefill_tiles import PrefillTiles
from minillm.viz.recompute import RecomputeGrid
from minillm.viz.roofline import DecodeRoofline
from minillm.viz.routes import Routes
from minillm.viz.scoreboard import Score, Scoreboard
from minillm.viz.timeline import Timeline
from minillm.viz.waterfall import Waterfall

__all__ = [
    "STYLE",
    "AllReduceRounds",
    "AttentionWeights",
    "Bars",
    "BatchComposition",
    "BlockMaskSteps",
    "BlockTableSteps",
    "BlockTables",
    "CacheGrowth",
    "Curves",
    "CutMask",
    "DecodeRoofline",
    "DecodeTiles",
    "DeviceUse",
    "EngineDiagram",
    "HostDeviceLanes",
    "InfluenceGrid",
    "LaneChart",
    "LaunchOverhead",
    "LayerDiagram",
    "LayerPath",
    "LinkRoofline",
    "LoadCurves",
    "LoadPoint",
    "MaskGrid",
    "MemoryTraffic",
    "PaddingRectangle",
    "PaddingSteps",
    "Panels",
    "Picture",
    "PictureError",
    "Places",
    "PolicyTimelines",
    "PoolState",
    "PoolUse",
    "PrefillTiles",
    "RecomputeGrid",
    "ReservedAgainstPaged",
    "Routes",
    "RunOverview",
    "Score",
    "Scoreboard",
    "Span",
    "ThroughputLatency",
    "Timeline",
    "WarpAccess",
    "Waterfall",
    "binary_bytes",
    "both_bytes",
    "decimal_bytes",
    "device_use",
    "plural",
    "pool_states",
    "side_by_side",
    "stacked",
    "text_table",
]
