// Which tokens of two answers are not the other's: what is left of their longest common subsequence.

const MOST_CELLS = 4_000_000;

/** Two lists of booleans: whether a token of the first, of the second, differs. */
export function differences(first, second) {
  let start = 0;
  while (start < first.length && start < second.length && first[start] === second[start]) start += 1;
  let [endA, endB] = [first.length, second.length];
  while (endA > start && endB > start && first[endA - 1] === second[endB - 1]) [endA, endB] = [endA - 1, endB - 1];
  const a = first.slice(start, endA), b = second.slice(start, endB);
  const differsA = first.map((_, i) => i >= start && i < endA), differsB = second.map((_, i) => i >= start && i < endB);
  if (a.length * b.length > MOST_CELLS) return [differsA, differsB];
  const width = b.length + 1, longest = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      longest[i * width + j] = a[i] === b[j] ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) {
      differsA[start + i] = differsB[start + j] = false;
      [i, j] = [i + 1, j + 1];
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return [differsA, differsB];
}

/** Words with the space before them, where an engine gives no tokens. */
export function words(text) {
  return text.match(/\s*\S+|\s+$/g) ?? [];
}
