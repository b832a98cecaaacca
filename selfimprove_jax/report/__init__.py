"""What a run found: report.json, report.html and the table printed at its end.

A report is a JSON-able dict. Optional keys are marked `?`; a run without that stage leaves them
out, or gives None or nothing. An estimate is {"value", "stderr", "unit"}.

  title, command    what was run
  commit            str or None
  config            nested dict: the whole config
  versions          name -> version
  hardware          name -> what the run had
  arms              name -> {
    label, train_tokens, steps, train_flops, all_in_flops, seconds, weight_decay, dropout_rate,
    best_validation, final_validation,
    evals           {"heldout_nll": estimate, "bits_per_byte": estimate}
    passes?         source -> how often its documents were seen, 0.97
    flops_parts?    any of seed, embedding, tuning, sampling, arm -> FLOPs
    curve?          [{"step", "tokens", "train_loss" or None, "validation_loss" or None}]}
  comparison        what `evaluation.comparison.compare` returns
  stages?           [{"name", "seconds", "tokens", "flops"}], None where it does not apply
  corpus?, tokenizer?  name -> count or fact
  conditioning?     {"true_nll", "random_nll", "gap": estimate, "gate", "num_pairs"}
  relevance?        {"own", "random", "real": estimate or number, "retained_share"}
  pairs?            {"counts"?: name -> count, "recall"?: estimate, "similarities"?: [number]}
  synthesis?        source -> {"counts"?, "finish_reasons"?: name -> count,
                               "quality"?: name -> estimate}
  examples?         [{"source", "seed_id", "seed_text", "text", "finish_reason", "similarity"}];
                    an unconditional sample has None for its seed's text
  pair_examples?    [{"d1", "d2", "d1_text", "d2_text", "similarity"}]
"""
