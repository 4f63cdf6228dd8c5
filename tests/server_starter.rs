//! A program written for Server::Starter, as it is installed: Starlet, with the example's application.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use reuseportd_bench::{Protocol, Spec};
use rustix::process::Signal;

use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::load::{Load, spec};
use crate::support::master::Master;
use crate::support::process::{signal, wait};
use crate::support::rounds;
use crate::support::unix_load::UnixLoad;
use crate::support::world::{Need, World, repository, world};

const STARLET: Need = Need::Runs("perl", &["-MPlack::Handler::Starlet", "-MServer::Starter", "-e1"]);
const REQUEST: &str = "GET / HTTP/1.0\r\n\r\n";

/// The example's own command line.
fn command() -> Vec<String> {
    let text = std::fs::read_to_string(repository("examples/server_starter.toml")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("command = ")).unwrap();
    let words: Vec<String> = serde_json::from_str(line).unwrap();
    let absolute = |word: String| match word.starts_with("examples/") {
        true => repository(&word).to_str().unwrap().to_owned(),
        false => word,
    };
    words.into_iter().map(absolute).collect()
}

/// Answers take 20 ms: some are under way at any time.
fn starlet(world: &World) -> App {
    let app = App::new(world, command()).workers(2).upgrade("stop_when = \"drained\"");
    app.app("environment = { ANSWER_AFTER = \"0.02\" }")
}

fn load(world: &World) -> Spec {
    let mut spec = spec(world).rate(60.0).burst(10, Duration::from_millis(300));
    spec.protocol = Protocol::Http("/".into());
    spec
}

/// The same server by itself, stopped and started again.
struct Alone {
    child: Child,
    place: String,
}

impl Alone {
    fn start(place: String) -> Alone {
        let child = Alone::spawn(&place);
        Alone { child, place }
    }

    fn spawn(place: &str) -> Child {
        let words = command();
        let mut alone = Command::new(&words[0]);
        alone.args(&words[1..words.len() - 1]).args(["--listen", place]).arg(&words[words.len() - 1]);
        alone.env("ANSWER_AFTER", "0.02").env_remove("NOTIFY_SOCKET").stderr(Stdio::null());
        alone.spawn().unwrap()
    }

    fn stop(&mut self) {
        signal(self.child.id(), Signal::TERM);
        wait(&mut self.child, PATIENCE).expect("it ends when it is told to");
    }

    fn restart(&mut self) {
        self.stop();
        self.child = Alone::spawn(&self.place);
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

#[test]
fn over_tcp_it_is_proven_by_its_listeners() {
    world(&[Need::Bpf, STARLET], |world| {
        let app = starlet(world).bind_master().readiness("listen");
        let master = Master::start(world, &app);
        let clients = Load::start(load(world));
        for generation in 2..=rounds(5, 10) + 1 {
            master.upgrade();
            clients.answered_by(generation);
        }
        let report = clients.end();
        assert_eq!(report.lost(), 0, "{report}\n{}", master.log());
        assert_eq!(report.generations.len(), rounds(5, 10) as usize + 1, "{report}");
        master.stop();
        let mut alone = Alone::start(world.address.to_string());
        wait_for(|| std::net::TcpStream::connect(world.address).is_ok());
        let clients = Load::start(load(world));
        alone.restart();
        clients.answered(50);
        let report = clients.end();
        assert!(report.lost() > 0, "the load shows nothing: {report}");
        alone.stop();
    });
}

#[test]
fn over_a_unix_socket_it_says_that_it_is_ready() {
    world(&[STARLET], |world| {
        let path = world.path("starter.sock");
        let mut app = starlet(world);
        app.listen.clear();
        let master = Master::start(world, &app.unix("default", &path, ""));
        let clients = UnixLoad::start(path.clone(), REQUEST, 8);
        for generation in 2..=rounds(5, 10) + 1 {
            master.upgrade();
            clients.answered_by(generation);
        }
        let fates = clients.end_lossless();
        assert_eq!(fates.answers.len(), rounds(5, 10) as usize + 1, "{fates:?}");
        master.stop();
        let place: PathBuf = path.clone();
        let mut alone = Alone::start(place.to_str().unwrap().to_owned());
        wait_for(|| std::os::unix::net::UnixStream::connect(&path).is_ok());
        let clients = UnixLoad::start(path, REQUEST, 8);
        let before = clients.fates_so_far().answers[&0];
        alone.stop();
        std::fs::remove_file(&place).ok();
        alone.child = Alone::spawn(&alone.place);
        clients.wait("served again", |fates| fates.answers[&0] > before + 30);
        assert!(!clients.end().lost.is_empty(), "the load shows nothing");
        alone.stop();
    });
}

/// Until a server has begun there is nothing to wait for but an answer.
fn wait_for(is_there: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !is_there() {
        assert!(std::time::Instant::now() < deadline, "the server does not come up");
        std::thread::yield_now();
    }
}
