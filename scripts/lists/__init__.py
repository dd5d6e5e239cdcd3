"""Lists of sounds: labels, groups, stratified splits, files and reports."""
