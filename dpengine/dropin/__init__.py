"""What code written for Opacus imports: engine, loader, memory manager, one module of several."""

from .loader import DPDataLoader as DPDataLoader
from .memory_manager import BatchMemoryManager as BatchMemoryManager
from .privacy_engine import PrivacyEngine as PrivacyEngine
from .together import Together as Together
