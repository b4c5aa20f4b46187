// Figures as people read them. A figure that is not known is a dash.

export const NONE = "–";

export function count(value) {
  return value === null || value === undefined ? NONE : Math.round(value).toLocaleString("en");
}

/** Three digits that matter. */
export function digits(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 0.00001) return value.toExponential(1);
  if (size < 0.001) return Number(value.toPrecision(2)).toFixed(size < 0.0001 ? 6 : 5);
  if (size >= 1000) return count(value);
  return value.toFixed(size < 0.1 ? 4 : size < 1 ? 3 : size < 10 ? 2 : size < 100 ? 1 : 0);
}

export function rate(value) {
  return value === null || value === undefined ? NONE : value === 0 ? "0" : value < 0.1 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : count(value);
}

export function seconds(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0 ms";
  if (value < 1) return `${value < 0.01 ? (1000 * value).toFixed(1) : Math.round(1000 * value)} ms`;
  return value < 60 ? `${value.toFixed(2)} s` : `${(value / 60).toFixed(1)} min`;
}

export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) [value, unit] = [value / 1024, unit + 1];
  return `${unit && value < 100 ? value.toFixed(value < 10 ? 2 : 1) : Math.round(value)} ${units[unit]}`;
}

export function percent(share, places = 1) {
  if (share === null || share === undefined) return NONE;
  const value = 100 * share;
  return `${Number.isInteger(value) ? value : value.toFixed(places)} %`;
}

export function clock(unix) {
  return new Date(1000 * unix).toLocaleTimeString("en-GB");
}

/** Time of day, with the date if that is not today's. */
export function moment(unix) {
  const then = new Date(1000 * unix);
  const today = then.toDateString() === new Date().toDateString();
  return today ? clock(unix) : `${then.toLocaleDateString("en-CA")} ${clock(unix)}`;
}

export function span(secondsAgo) {
  const value = Math.max(0, Math.round(secondsAgo));
  if (value < 90) return `${value} s`;
  return value < 5400 ? `${Math.round(value / 60)} min` : `${Math.round(value / 3600)} h`;
}
