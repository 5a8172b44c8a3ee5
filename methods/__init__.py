"""What makes data, by paper: ET-Agent's edits, critics, selection and curriculum, AutoTool's warm-up and refinement."""
