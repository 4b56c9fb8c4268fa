"""Preference objectives, one paper a file, and the table of their names."""

from __future__ import annotations

from diffalign.objectives.base import Objective
from diffalign.objectives.cdpo import ConservativeDPO
from diffalign.objectives.diffusion_dro import DiffusionDRO
from diffalign.objectives.diffusion_nft import DiffusionNFT
from diffalign.objectives.dmpo import DMPO
from diffalign.objectives.dpo import DiffusionDPO
from diffalign.objectives.dso_dro import DSODRO
from diffalign.objectives.dspo import DSPO
from diffalign.objectives.f_dpo import FDPO
from diffalign.objectives.inpo import InPO
from diffalign.objectives.inversion_dpo import InversionDPO
from diffalign.objectives.ipo import IPO
from diffalign.objectives.kto import KTO
from diffalign.objectives.linear_dpo import LinearDPO
from diffalign.objectives.listwise_dpo import ListwiseDPO
from diffalign.objectives.mapo import MaPO
from diffalign.objectives.poly_dpo import PolyDPO
from diffalign.objectives.robust_dpo import RobustDPO
from diffalign.objectives.seppo import SePPO
from diffalign.objectives.sft import SFT
from diffalign.objectives.smpo import SmPO
from diffalign.objectives.spo import SPO

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (
        DiffusionDPO,
        SFT,
        MaPO,
        IPO,
        ConservativeDPO,
        RobustDPO,
        PolyDPO,
        LinearDPO,
        DMPO,
        DSPO,
        ListwiseDPO,
        FDPO,
        KTO,
        DSODRO,
        DiffusionDRO,
        InPO,
        SmPO,
        InversionDPO,
        SePPO,
        SPO,
        DiffusionNFT,
    )
}

__all__ = [
    "DMPO",
    "DSODRO",
    "DSPO",
    "FDPO",
    "IPO",
    "KTO",
    "OBJECTIVES",
    "SFT",
    "SPO",
    "ConservativeDPO",
    "DiffusionDPO",
    "DiffusionDRO",
    "DiffusionNFT",
    "InPO",
    "InversionDPO",
    "LinearDPO",
    "ListwiseDPO",
    "MaPO",
    "Objective",
    "PolyDPO",
    "RobustDPO",
    "SePPO",
    "SmPO",
]
