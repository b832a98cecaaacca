"""How the calls of a step are made."""

from tests.pipelines.entigraph import writer


def test_the_entities_of_several_documents_are_asked_for_at_once(run, values, server, tmp_path):
  def behave(call):
    said = writer.behave(call, lambda call: False)
    return writer.Said(said.body, wait=0.2)

  server.behave = behave
  page = writer.page(values, server.url, str(tmp_path / "calls.sqlite"))
  run(page, tmp_path / "run", writer.STAGES[:3])
  assert (len(server.calls), server.most_at_once) == (2, 2)
