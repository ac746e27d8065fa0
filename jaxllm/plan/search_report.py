"""What a study ends with: the text, report.html, and best.yaml, the config of the best trial."""

from jaxllm import config
from jaxllm.plan import search_text
from jaxllm.plan.search_findings import findings
from jaxllm.plan.search_folder import Folder, write_whole
from jaxllm.plan.search_setup import Study, nested, without_place


def write_page(study: Study, folder: Folder) -> dict:
    """Writes report.html of the jobs that have ended; returns what was found in them."""
    from jaxllm.plan.search_page import page
    from jaxllm.report.page import write

    jobs = [job for job in folder.jobs() if job["state"] != "running"]
    found = findings(study.rules, jobs, study.metric)
    write(page(study.rules, folder, found, jobs), folder.path / "report.html")
    return found


def report(study: Study, folder: Folder) -> dict:
    """Prints and writes what was found; returns it."""
    found = write_page(study, folder)
    print(search_text.whole(study.rules, found))
    if found["ranking"]:
        best = found["ranking"][0]
        head = f"# Trial {best['trial']} of {folder.path}: {study.metric} {best['metric']:.4f} at step {best['step']}\n"
        write_whole(folder.path / "best.yaml", head + config.to_yaml(without_place(nested(study.base, best["params"]))))
        print(f"\nbest: jaxllm pretrain {folder.path / 'best.yaml'} --run.dir=FOLDER")
    print(f"report: {folder.path / 'report.html'}")
    return {**found, "study": str(folder.path), "report": str(folder.path / "report.html")}
