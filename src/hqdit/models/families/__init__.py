"""Adapters of model families: which layers a block has, what they compute, and which of them read one input.

Each family is a row of a table. Names and shared inputs are those of diffusers' model classes.
"""

from hqdit.models.adapter import register_adapter
from hqdit.models.families.cross_attention import CROSS_ATTENTION
from hqdit.models.families.family import FamilyAdapter
from hqdit.models.families.joint_attention import JOINT_ATTENTION
from hqdit.models.families.one_stream import ONE_STREAM

FAMILIES = (*CROSS_ATTENTION, *JOINT_ATTENTION, *ONE_STREAM)

for _family in FAMILIES:
    register_adapter(FamilyAdapter(_family))
