"""Nobody starts it."""

raise SystemExit("ranks import no program of ComfyUI's")
