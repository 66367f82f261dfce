"""What code written for Opacus imports: engine, loader and memory manager, around our own core."""

from .loader import DPDataLoader as DPDataLoader
from .memory_manager import BatchMemoryManager as BatchMemoryManager
from .privacy_engine import PrivacyEngine as PrivacyEngine
