//! An `upgrade.check` in the hands of the test: each run writes down its environment, and ends as it is told.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::Mode;
use reuseportd_wire::status::Receipt;

use super::app::App;
use super::master::Master;
use super::world::World;

/// What a check prints before it waits for its answer.
pub(crate) const LAST_WORDS: &str = "asking-the-gate";

/// A step of an upgrade does not end before a check in it has ended: so the test holds it for as long as it looks.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Open for both: writing waits for no check, and a check waits for the next line.
    answers: fs::File,
    log: PathBuf,
    script: PathBuf,
}

/// One run of the check.
#[derive(Debug, Clone)]
pub(crate) struct Run(BTreeMap<String, String>);

impl Gate {
    pub(crate) fn new(world: &World) -> Gate {
        let [answers, log, script] = ["answers", "checks", "check.sh"].map(|name| world.path(name));
        nix::unistd::mkfifo(&answers, Mode::from_bits_truncate(0o666)).unwrap();
        fs::write(&log, "").unwrap();
        let text = format!(
            "#!/bin/sh\n\
             line=$(env -0 | tr '\\0' '\\t')\n\
             echo \"UID=$(id -u)\tAT=$(date +%s%N)\tPID=$$\t$line\" >>{}\n\
             echo {LAST_WORDS}\n\
             read -r status <{} || exit 99\n\
             exit \"$status\"\n",
            log.display(),
            answers.display()
        );
        fs::write(&script, text).unwrap();
        // The app's user runs it.
        for (path, mode) in [(&answers, 0o666), (&log, 0o666), (&script, 0o755)] {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
        let answers = fs::File::options().read(true).write(true).open(&answers).unwrap();
        Gate { answers, log, script }
    }

    /// The app with this check; after the first one in a phase there is another only when `interval` has passed.
    pub(crate) fn guards(&self, app: App, interval: &str) -> App {
        app.upgrade(format!("check = [\"/bin/sh\", {:?}]", self.script))
            .upgrade(format!("check_interval = {interval:?}"))
    }

    /// So many runs, the one that waits included, end with this exit status.
    pub(crate) fn answer(&self, runs: usize, status: i32) {
        (&self.answers).write_all(format!("{status}\n").repeat(runs).as_bytes()).unwrap();
    }

    /// The check's program.
    pub(crate) fn script(&self) -> &Path {
        &self.script
    }

    /// The runs so far.
    pub(crate) fn runs(&self) -> Vec<Run> {
        let text = fs::read_to_string(&self.log).unwrap();
        // The last line may be half written.
        let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let pairs = |line: &str| {
            let pairs = line.trim_end().split('\t').filter_map(|pair| pair.split_once('='));
            pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
        };
        lines.map(|line| Run(pairs(line))).collect()
    }

    /// Waits until so many have begun, and gives the last of them.
    pub(crate) fn begun(&self, master: &Master, runs: usize) -> Run {
        master.wait_status("checked", |_| self.runs().len() >= runs);
        self.runs()[runs - 1].clone()
    }
}

impl Run {
    /// A variable of its environment; or `UID`, `AT` (nanoseconds), `PID`.
    pub(crate) fn variable(&self, name: &str) -> &str {
        self.0.get(name).unwrap_or_else(|| panic!("{name} is not in {self:#?}"))
    }

    pub(crate) fn number<T: std::str::FromStr>(&self, name: &str) -> T {
        let value = self.variable(name);
        value.parse().unwrap_or_else(|_| panic!("{name}={value}"))
    }

    /// The receipt so far, which has no outcome yet.
    pub(crate) fn receipt(&self) -> Receipt {
        let text = self.variable("REUSEPORTD_RECEIPT");
        let mut value: serde_json::Value = serde_json::from_str(text).unwrap();
        let outcome = value["outcome"].take();
        assert!(outcome.is_null(), "{text}");
        value["outcome"] = "completed".into();
        serde_json::from_value(value).unwrap_or_else(|error| panic!("{error}: {text}"))
    }
}
