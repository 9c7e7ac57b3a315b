// What the page says about each operation. Anything not listed here speaks with the service's own summary.

export const ORDER = ["compress", "restore", "inspect", "verify", "diff", "analyze", "convert"];

const COMPRESSED = "a <code>.sc.safetensors</code> file that Compress made";
const ANY = "a <code>.pt</code> or <code>.safetensors</code> file, or a whole checkpoint folder";

const WORDS = {
  compress: { label: "Compress", running: "Compressing", drop: "Drop a checkpoint here", hint: ANY },
  restore: { label: "Restore", running: "Restoring", drop: "Drop a compressed checkpoint here", hint: COMPRESSED, compressed: true },
  inspect: { label: "Inspect", running: "Inspecting", drop: "Drop a checkpoint to look into", hint: `${ANY}, compressed or not` },
  verify: { label: "Verify", running: "Verifying", drop: "Drop a compressed checkpoint to check", hint: COMPRESSED, compressed: true },
  diff: { label: "Compare", running: "Comparing", drop: "Drop the first of two checkpoints here", hint: "or both at once; compressed or not" },
  analyze: { label: "Analyze", running: "Analyzing", drop: "Drop a checkpoint to measure", hint: ANY },
  convert: { label: "Convert", running: "Converting", drop: "Drop a checkpoint to convert", hint: `${ANY}, compressed or not` },
};

export const words = (operation) => WORDS[operation] || { label: operation, running: "Running", drop: "Drop a checkpoint here", hint: ANY };

const OPTIONS = {
  max_step_error: ["Largest error, in optimizer steps", "the preset's, or for example 0.01 or 1 %"],
  max_update_error: ["Largest error of the update", "none, or for example 0.01 or 1 %"],
  max_weight_error: ["Largest error of the weights", "none, or for example 0.0001"],
  rules: ["Rules, one per line", "*.embed.*=split"],
  to: ["Convert to, one per line", "foam(level=2)"],
  layout: ["Another framework's files"],
  verify: ["Read the result back, check it, and measure the update"],
  safe_only: ["Refuse files whose unpickling could run code"],
  strict: ["Refuse rules that match nothing"],
  pack: ["Packing", "auto"],
  max_shard_size: ["Largest file of the output", "5GB"],
  sha256: ["Store the original's SHA-256 (Lossless always does)"],
  snr: ["Signal-to-noise ratio of the second moments"],
  curve: ["Size against step error"],
  cutoff: ["Share only above this ratio", "1"],
};

export const optionLabel = (name) => (OPTIONS[name] || [name])[0];
export const optionExample = (name) => (OPTIONS[name] || [name, ""])[1] || "";
