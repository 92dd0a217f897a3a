"""What a deployment holds expert weights in. Apart: some read it before they have torch."""

from typing import Literal

ExpertsDtype = Literal["auto", "int8", "int4"]  # auto: in the dtype of the rows
