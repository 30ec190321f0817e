"""The bundle contract: `manifest` (types), `store` (directories on disk), `bundle` (an opened one)."""
