// Colours and letters of minillm/viz/palette.py; a test compares them, field by field. JSON below the first line.
export const PALETTE = {
  "states": {
    "waiting": { "letter": "w", "name": "waiting", "color": "#DDDDDD" },
    "preempted": { "letter": "!", "name": "preempted", "color": "#F0E442" },
    "swapped": { "letter": "s", "name": "swapped", "color": "#8FA3B0" },
    "prefill": { "letter": "P", "name": "prefill", "color": "#0072B2" },
    "decode": { "letter": "D", "name": "decode", "color": "#E69F00" },
    "recompute": { "letter": "R", "name": "recompute", "color": "#D55E00" },
    "padding": { "letter": "x", "name": "padding", "color": "#FFFFFF" },
    "finished": { "letter": ".", "name": "finished", "color": "#FFFFFF" }
  },
  "cached": { "letter": "*", "name": "cached", "color": "#DDDDDD" },
  "free": { "letter": "-", "name": "free", "color": "#FFFFFF" },
  "empty": { "letter": ".", "name": "empty slot of a used block", "color": "#FFFFFF" },
  "owners": ["#A5D8F3", "#F4A9BC", "#EAD68B", "#C9B6EA", "#D6A78C", "#BDBA92"],
  "letters": "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
};
