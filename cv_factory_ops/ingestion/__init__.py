"""From files, arrays and captured requests to one checked, split and digested table of images."""
