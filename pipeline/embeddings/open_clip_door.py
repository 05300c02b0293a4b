"""The only file that imports open_clip."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import open_clip as open_clip
else:
    class _OpenClip:
        """open_clip, imported at its first use: it loads torch, and most commands read only the settings of CLIP."""

        def __getattr__(self, name: str) -> Any:
            import open_clip
            return getattr(open_clip, name)

    open_clip = _OpenClip()
