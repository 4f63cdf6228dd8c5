//! What can't be taken over from is refused, and left as it is.

use std::fs;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use reuseportd_sys::bpf::EbpfGroup;
use rustix::process::Signal;

use super::server::{Server, python};
use super::{NGINX, app, take_over};
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::{Running, keepers_of, kill, processes_of};
use crate::support::world::{Need, World, world};

/// Nobody's user here.
const UID: u32 = 61_238;

/// The takeover is refused in these words, by exit code 1.
fn refused_by(mut master: Master<'_>, words: &[&str]) {
    assert_eq!(master.wait_end(PATIENCE), Some(1), "{}", master.log());
    let log = master.log();
    assert!(words.iter().all(|word| log.contains(word)), "{words:?}: {log}");
    assert!(!log.contains("event=\"takeover\""), "{log}");
    assert_eq!(processes_of(master.app()), []);
}

/// The same for this config, beside another master.
fn refused_beside(config: &Path, pid: u32, words: &[&str]) {
    let mut command = Command::new(REUSEPORTD);
    command.args(["takeover", "--pid", &pid.to_string(), "--config"]).arg(config);
    Running::start(command).finish(PATIENCE).refused(words);
}

fn refused(world: &World, app: &App, pid: u32, words: &[&str]) {
    refused_by(take_over(world, app, pid), words);
}

/// Another address of the world.
fn beside(world: &World) -> SocketAddr {
    SocketAddr::new(world.address.ip(), world.address.port() + 1)
}

#[test]
fn listeners_and_addresses_must_be_the_same() {
    world(&[Need::Root, Need::Bpf, Need::Python], |world| {
        let mut server = Server::python(world, 1, &[beside(world)]);
        let (here, there) = (world.address.to_string(), beside(world).to_string());
        let named = format!("process {} (python3)", server.pid());
        refused(world, &app(world, ""), server.pid(), &[&named, &there, "add a [[listen]]"]);
        let mut three = app(world, "");
        let third = SocketAddr::new(world.address.ip(), world.address.port() + 2);
        three.listen.extend([("second".into(), beside(world)), ("third".into(), third)]);
        let said =
            [&*format!("does not listen on {third}"), &*format!("{here}, {there}"), "change the config"];
        refused(world, &three, server.pid(), &said);
        server.assert_untouched();
    });
}

#[test]
fn processes_that_are_not_the_server_are_not_taken_for_it() {
    world(&[Need::Root, Need::Bpf, NGINX], |world| {
        let app = app(world, "");
        let mut ended = Command::new("true").spawn().unwrap();
        ended.wait().unwrap();
        refused(world, &app, ended.id(), &[&format!("there is no process {}", ended.id())]);
        refused(world, &app, std::process::id(), &["it is above this master"]);

        let mut server = Server::nginx(world, "");
        let worker = server.pids().into_iter().find(|pid| *pid != server.pid()).unwrap();
        let held = format!("held by process {} (nginx) as well", server.pid());
        refused(world, &app, worker, &[&held, "name that by --pid"]);
        server.assert_untouched();
    });
}

#[test]
fn an_engine_that_cannot_move_connections_is_refused() {
    world(&[Need::Python], |world| {
        let mut server = Server::python(world, 1, &[]);
        for engine in ["cbpf", "none"] {
            let app = app(world, "").engine(engine).readiness("notify");
            refused(world, &app, server.pid(), &["without a loss", "set steering.engine to \"auto\""]);
        }
        server.assert_untouched();
    });
}

#[test]
fn sockets_of_another_user_or_network_are_refused() {
    world(&[Need::Root, Need::Bpf, Need::Python], |world| {
        let mut command = python(1);
        command.uid(UID).arg(world.address.to_string());
        let mut server = Server::start(world, command);
        let said = [&*format!("belongs to user {UID}"), "would to user 0", &*format!("set app.user = {UID}")];
        refused(world, &app(world, ""), server.pid(), &said);
        server.assert_untouched();
        drop(server);

        let mut command = Command::new("unshare");
        let script = "ip link set lo up && exec \"$@\"";
        command.args(["--net", "sh", "-c", script, "-"]);
        let inner = python(1);
        command.arg(inner.get_program()).args(inner.get_args()).arg(world.address.to_string());
        let server = Server::start(world, command);
        refused(world, &app(world, ""), server.pid(), &["in another network namespace"]);
    });
}

/// The master may steer, but not look into others' processes.
#[test]
fn a_server_out_of_reach_is_refused() {
    world(&[Need::Root, Need::Bpf, Need::Python, Need::Runs("setpriv", &["--version"])], |world| {
        let mut server = Server::python(world, 1, &[]);
        let program = world.path("reuseportd");
        fs::copy(REUSEPORTD, &program).unwrap();
        chown(world.path(""), Some(UID), Some(UID)).unwrap();
        let mut command = Command::new("setpriv");
        let capabilities = "+bpf,+net_admin,+perfmon";
        command.args(["--reuid", &UID.to_string(), "--regid", &UID.to_string(), "--clear-groups"]);
        command.args(["--inh-caps", capabilities, "--ambient-caps", capabilities]).arg(program);
        command.args(["takeover", "--pid", &server.pid().to_string()]);
        let app = App::new(world, ["/bin/true"]).readiness("listen");
        refused_by(Master::launch(world, &app, command), &["can't be", "ermission denied", "CAP_SYS_PTRACE"]);
        server.assert_untouched();
    });
}

#[test]
fn sockets_without_groups_are_refused() {
    world(&[Need::Python], |world| {
        let mut server = Server::python(world, 1, &[]);
        let mut datagrams = app(world, "").readiness("notify");
        datagrams.listen_lines.push((None, "protocol = \"udp\""));
        refused(world, &datagrams, server.pid(), &["waits in a UDP socket can't be moved"]);
        let path = world.path("socket");
        let mut unix = app(world, "").readiness("notify");
        unix.write();
        let text = fs::read_to_string(&unix.path).unwrap();
        let listen = format!(
            "[[listen]]\nname = \"path\"\naddress = \"unix:{}\"\nbind = \"master\"\n",
            path.display()
        );
        unix.verbatim = Some(text + &listen);
        refused(world, &unix, server.pid(), &["[[listen]] \"path\"", "can be only one socket's"]);
        assert!(!path.exists());
        server.assert_untouched();
    });
}

#[test]
fn what_a_master_has_started_is_refused() {
    world(&[Need::Bpf, Need::Python], |world| {
        let app = app(world, "");
        let mut master = Master::start(world, &app);
        let workers = master.serving();
        refused_beside(&app.path, workers[0], &["another master runs this app"]);
        let text = fs::read_to_string(&app.path).unwrap();
        let other = world.path("other.toml");
        let (name, socket) = (format!("{}-other", world.app), "other/control.sock");
        fs::write(&other, text.replace(&world.app, &name).replace("run/control.sock", socket)).unwrap();
        for pid in [workers[0], master.pid()] {
            let said = ["is a worker of the reuseportd master of app", "`reuseportd upgrade`"];
            refused_beside(&other, pid, &said);
        }
        assert_eq!(master.serving(), workers);
        // Those that nobody has any more are for the next master.
        master.signal(Signal::STOP);
        kill(keepers_of(&world.app));
        master.kill();
        refused_beside(&app.path, workers[0], &["`reuseportd --config` takes them over"]);
    });
}

#[test]
fn a_stranger_at_its_address_is_refused() {
    world(&[Need::Bpf, Need::Python], |world| {
        let with_reuseport = || {
            let mut command = python(1);
            command.env("REUSEPORT", "1").arg(world.address.to_string());
            Server::start(world, command)
        };
        let (server, _stranger) = (with_reuseport(), with_reuseport());
        let said = [&*format!("(python3) listens on {} too", world.address), "end it first"];
        refused(world, &app(world, ""), server.pid(), &said);
        server.assert_no_program();
    });
}

#[test]
fn a_listener_under_another_program_is_refused_and_stays_under_it() {
    world(&[Need::Bpf, Need::Python], |world| {
        let mut command = python(1);
        command.env("REUSEPORT", "1").arg(world.address.to_string());
        let server = Server::start(world, command);
        let other = EbpfGroup::new(8, None).unwrap();
        other.admit(0, server.listener().as_fd()).unwrap();
        other.attach(server.listener().as_fd()).unwrap();
        refused(
            world,
            &app(world, ""),
            server.pid(),
            &["a steering program has it already", "restart the server"],
        );
        EbpfGroup::detach(server.listener().as_fd()).expect("the other program was taken away");
    });
}
