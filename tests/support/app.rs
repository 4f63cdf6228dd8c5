//! The config of a test's service.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::world::{World, example};

/// What can be said in a config as the tests use it; lines for a table are taken as they are.
#[derive(Debug, Clone)]
pub(crate) struct App {
    pub(crate) command: Vec<String>,
    pub(crate) workers: u32,
    pub(crate) engine: &'static str,
    pub(crate) readiness: &'static str,
    pub(crate) listen: Vec<(String, SocketAddr)>,
    /// Lines of the `[[listen]]` with this name, or of all.
    pub(crate) listen_lines: Vec<(Option<&'static str>, &'static str)>,
    pub(crate) probe: Vec<String>,
    pub(crate) app: Vec<String>,
    pub(crate) steering: Vec<String>,
    pub(crate) upgrade: Vec<String>,
    pub(crate) restart: Vec<String>,
    pub(crate) control: Vec<String>,
    /// `timeout` of `[watchdog]`; without one there is no such table.
    pub(crate) watchdog: Option<&'static str>,
    /// The whole file as it is, instead of all of this.
    pub(crate) verbatim: Option<String>,
    name: String,
    socket: PathBuf,
    /// Where it is written.
    pub(crate) path: PathBuf,
}

impl App {
    /// Four workers running this command on the world's address, ready by notification.
    pub(crate) fn new<S: Into<String>>(world: &World, command: impl IntoIterator<Item = S>) -> App {
        App {
            command: command.into_iter().map(Into::into).collect(),
            workers: 4,
            engine: "auto",
            readiness: "notify",
            listen: vec![("default".into(), world.address)],
            listen_lines: Vec::new(),
            probe: Vec::new(),
            app: Vec::new(),
            steering: Vec::new(),
            upgrade: Vec::new(),
            restart: Vec::new(),
            control: Vec::new(),
            watchdog: None,
            verbatim: None,
            name: world.app.clone(),
            socket: world.path("run/control.sock"),
            path: world.path("app.toml"),
        }
    }

    /// The difficult worker with these options; in mode `activated` with all its sockets made by the master.
    pub(crate) fn test_worker(world: &World, options: &str) -> App {
        let app = App::new(world, test_worker(options));
        if options.contains("--mode activated") { app.bind_master() } else { app }
    }

    /// The master makes the sockets.
    pub(crate) fn bind_master(mut self) -> App {
        self.listen_lines.push((None, "bind = \"master\""));
        self
    }

    pub(crate) fn workers(mut self, workers: u32) -> App {
        self.workers = workers;
        self
    }

    pub(crate) fn engine(mut self, engine: &'static str) -> App {
        self.engine = engine;
        self
    }

    pub(crate) fn readiness(mut self, method: &'static str) -> App {
        self.readiness = method;
        self
    }

    /// A line of `[readiness]`.
    pub(crate) fn probe(mut self, line: impl Into<String>) -> App {
        self.probe.push(line.into());
        self
    }

    /// A line of `[app]`.
    pub(crate) fn app(mut self, line: impl Into<String>) -> App {
        self.app.push(line.into());
        self
    }

    /// A line of each `[[listen]]`.
    pub(crate) fn listen(mut self, line: &'static str) -> App {
        self.listen_lines.push((None, line));
        self
    }

    /// A `[[listen]]` with a path, behind all others.
    pub(crate) fn unix(mut self, name: &str, path: &Path, line: &str) -> App {
        let own = format!("name = {name:?}\naddress = \"unix:{}\"\nbind = \"master\"", path.display());
        self.control.push(format!("[[listen]]\n{own}\n{line}"));
        self
    }

    /// Where the control socket is, and with it all runtime files.
    pub(crate) fn socket(mut self, path: PathBuf) -> App {
        self.socket = path;
        self
    }

    /// The file beside the control socket whose name ends like this.
    pub(crate) fn runtime_file(&self, suffix: &str) -> PathBuf {
        let mut path = self.socket.clone().into_os_string();
        path.push(suffix);
        path.into()
    }

    /// A line of `[steering]`.
    pub(crate) fn steering(mut self, line: impl Into<String>) -> App {
        self.steering.push(line.into());
        self
    }

    /// A line of `[upgrade]`.
    pub(crate) fn upgrade(mut self, line: impl Into<String>) -> App {
        self.upgrade.push(line.into());
        self
    }

    /// A line of `[restart]`.
    pub(crate) fn restart(mut self, line: impl Into<String>) -> App {
        self.restart.push(line.into());
        self
    }

    /// How long a worker may give no sign of life.
    pub(crate) fn watchdog(mut self, timeout: &'static str) -> App {
        self.watchdog = Some(timeout);
        self
    }

    /// Writes the file.
    pub(crate) fn write(&self) {
        std::fs::write(&self.path, self.text()).unwrap();
    }

    /// Writes it with a table that nobody knows.
    pub(crate) fn write_invalid(&self) {
        std::fs::write(&self.path, self.text() + "[nonsense]\n").unwrap();
    }

    fn text(&self) -> String {
        if let Some(text) = &self.verbatim {
            return text.clone();
        }
        let mut text = String::new();
        let mut table = |header: &str, lines: Vec<String>| {
            writeln!(text, "{header}\n{}", lines.join("\n")).unwrap();
        };
        let own = [
            format!("name = {:?}", self.name),
            format!("command = {:?}", self.command),
            format!("workers = {}", self.workers),
        ];
        table("[app]", own.into_iter().chain(self.app.iter().cloned()).collect());
        for (name, address) in &self.listen {
            let own = vec![format!("name = {name:?}"), format!("address = \"{address}\"")];
            let others = self.listen_lines.iter().filter(|(of, _)| of.is_none_or(|of| of == name));
            table("[[listen]]", own.into_iter().chain(others.map(|(_, line)| (*line).to_owned())).collect());
        }
        let engine = format!("engine = {:?}", self.engine);
        table("[steering]", [engine].into_iter().chain(self.steering.iter().cloned()).collect());
        let method = format!("method = {:?}", self.readiness);
        table("[readiness]", [method].into_iter().chain(self.probe.iter().cloned()).collect());
        table("[upgrade]", self.upgrade.clone());
        table("[restart]", self.restart.clone());
        if let Some(timeout) = self.watchdog {
            table("[watchdog]", vec![format!("timeout = {timeout:?}")]);
        }
        let socket = format!("socket = {:?}", self.socket);
        table("[control]", [socket].into_iter().chain(self.control.iter().cloned()).collect());
        text
    }
}

/// The difficult worker's command line.
pub(crate) fn test_worker(options: &str) -> Vec<String> {
    let program = example("test_worker").to_str().unwrap().to_owned();
    std::iter::once(program).chain(options.split_whitespace().map(str::to_owned)).collect()
}
