/* Blocks of a contraction whose rows or columns are counted at run time. Comes after struct oc_block. */

/* The block with tiles for `rows` rows: as few as there can be, and of even height. */
static inline struct oc_block oc_even(struct oc_block block, long rows) {
  block.tiles = (int)((rows + block.rows - 1) / block.rows);
  block.rows = (int)((rows + block.tiles - 1) / block.tiles);
  return block;
}

/* The columns of one of `panels` panels of even width, in vectors of `lanes`, that cover `n`; its tiles
   are to be as tall as its width allows. */
static inline struct oc_block oc_panel(long panel, long panels, long n, int lanes, const int *tallest) {
  const long vectors = (n + lanes - 1) / lanes, width = vectors / panels, wider = vectors % panels;
  const long first = (panel * width + (panel < wider ? panel : wider)) * lanes;
  const int across = (int)(width + (panel < wider));
  const long stop = first + across * lanes;
  return (struct oc_block){(int)first, (int)(stop < n ? stop : n), across, tallest[across], 0, 0, 0, 0};
}

