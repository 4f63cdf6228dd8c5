//! SO_REUSEPORT set at `bind()` for programs that never heard of it.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use reuseportd_sys::bpf::bind::{Rule, force_reuseport};
use reuseportd_sys::cgroup;
use reuseportd_sys::diag::Protocol;
use reuseportd_sys::executable::PinnedExecutable;
use reuseportd_sys::pidfd;
use socket2::{Domain, Socket, Type};

use crate::process::{Around, SHELL, finish, start, wait_for_end};
use crate::world::*;

/// The process that moves into the cgroup, which must be none that runs other tests.
const ALONE: &str = "REUSEPORTD_TEST_CGROUP";

/// A cgroup below that of the tests, removed at the end.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Cgroup {
        let own = cgroup::own().unwrap().unwrap();
        let path = own.join(format!("reuseportd-facts-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Cgroup(path)
    }

    fn force(&self, addresses: &[&str]) {
        let rule = |address: &&str| match address.strip_prefix("udp ") {
            Some(address) => (Protocol::Udp, address.parse().unwrap()),
            None => (Protocol::Tcp, address.parse().unwrap()),
        };
        let rules: Vec<Rule> = addresses.iter().map(rule).collect();
        force_reuseport(File::open(&self.0).unwrap().as_fd(), &rules).unwrap();
    }

    fn procs(&self) -> File {
        File::options().write(true).open(self.0.join("cgroup.procs")).unwrap()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// Whether a socket of this process that did not ask for it has SO_REUSEPORT after `bind()`.
fn is_forced(kind: Type, address: &str) -> bool {
    let (_socket, is_forced) = bind(kind, address.parse().unwrap()).unwrap();
    is_forced
}

fn bind(kind: Type, address: SocketAddr) -> std::io::Result<(Socket, bool)> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    let is_forced = socket.reuse_port()?;
    Ok((socket, is_forced))
}

/// In a process of its own, inside the cgroup that the other one has made.
fn inside(addresses: &str) {
    assert!(!is_forced(Type::STREAM, "127.0.0.1:8080"), "not in the cgroup yet");
    let path = PathBuf::from(addresses);
    let place = Cgroup(path);
    fs::write(place.0.join("cgroup.procs"), "0").unwrap();
    for (kind, address, forced) in [
        (Type::STREAM, "127.0.0.1:8080", true),
        (Type::STREAM, "[::ffff:127.0.0.1]:8080", true),
        (Type::STREAM, "127.0.0.2:8080", false),
        (Type::STREAM, "0.0.0.0:8080", false),
        (Type::STREAM, "[::]:8080", false),
        (Type::STREAM, "127.0.0.1:8081", false),
        (Type::DGRAM, "127.0.0.1:8080", false),
        (Type::DGRAM, "127.0.0.1:8053", true),
        (Type::DGRAM, "[::ffff:127.0.0.1]:8053", true),
        (Type::DGRAM, "127.0.0.2:8053", false),
        (Type::STREAM, "127.0.0.1:8053", false),
        (Type::DGRAM, "[::1]:8054", true),
        (Type::DGRAM, "127.0.0.1:8090", false),
        (Type::DGRAM, "127.0.0.1:8055", true),
        (Type::STREAM, "127.0.0.1:8055", true),
        (Type::STREAM, "0.0.0.0:8090", true),
        (Type::STREAM, "[::]:8090", true),
        (Type::STREAM, "[::ffff:0.0.0.0]:8090", true),
        (Type::STREAM, "127.0.0.1:8090", false),
        (Type::STREAM, "[::1]:8090", false),
        (Type::STREAM, "[::1]:9000", true),
        (Type::STREAM, "[::]:9000", false),
        (Type::STREAM, "127.0.0.1:9000", false),
        (Type::STREAM, "255.255.255.254:65535", false),
        (Type::STREAM, "127.0.0.1:0", false),
    ] {
        match bind(kind, address.parse().unwrap()) {
            Ok((_, is_forced)) => assert_eq!(is_forced, forced, "{kind:?} {address}"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::AddrNotAvailable, "{address}: {error}"),
        }
    }
    // What it is for: a second one on the same address.
    let first = TcpListener::bind("127.0.0.1:8080").unwrap();
    let second = TcpListener::bind("127.0.0.1:8080").unwrap();
    // An option a program has set stays as it is, and a failing bind fails as ever.
    let _other = TcpListener::bind("127.0.0.1:8082").unwrap();
    assert_eq!(TcpListener::bind("127.0.0.1:8082").unwrap_err().kind(), ErrorKind::AddrInUse);
    // Later addresses take the place of the former ones, for sockets bound from now on.
    place.force(&["127.0.0.1:8081"]);
    assert_eq!(TcpListener::bind("127.0.0.1:8080").unwrap_err().kind(), ErrorKind::AddrInUse);
    drop((first, second));
    assert!(!is_forced(Type::STREAM, "127.0.0.1:8080"));
    assert!(is_forced(Type::STREAM, "127.0.0.1:8081"));
    // One family alone, and none.
    place.force(&["[::1]:9000"]);
    assert!(is_forced(Type::STREAM, "[::1]:9000"));
    place.force(&[]);
    assert!(!is_forced(Type::STREAM, "127.0.0.1:8081") && !is_forced(Type::STREAM, "[::1]:9000"));
    // Where it was, so that the cgroup is empty again.
    fs::write(place.0.parent().unwrap().join("cgroup.procs"), "0").unwrap();
    assert!(!is_forced(Type::STREAM, "127.0.0.1:8081"));
}

#[test]
fn sockets_bound_to_the_addresses_have_it_and_no_others() {
    with(&[Need::Network, Need::Bpf], || {
        if let Ok(path) = std::env::var(ALONE) {
            return inside(&path);
        }
        let place = Cgroup::new("addresses");
        let tcp = ["127.0.0.1:8080", "0.0.0.0:8090", "[::1]:9000", "255.255.255.255:65535", "127.0.0.1:8055"];
        place.force(&[&tcp[..], &["udp 127.0.0.1:8053", "udp [::1]:8054", "udp 127.0.0.1:8055"]].concat());
        let name = "bind::sockets_bound_to_the_addresses_have_it_and_no_others";
        let mut alone = Command::new(std::env::current_exe().unwrap());
        let output = alone.args(["--exact", name, "--nocapture"]).env(ALONE, &place.0).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(!place.0.exists(), "{} ran", name);
    });
}

/// As many addresses as a config may have.
#[test]
fn the_kernel_accepts_256_addresses() {
    with(&[Need::Network, Need::Bpf], || {
        let place = Cgroup::new("many");
        let addresses: Vec<String> = (1..=256).map(|port| format!("0.0.0.0:{port}")).collect();
        place.force(&addresses.iter().map(String::as_str).collect::<Vec<_>>());
        for (port, forced) in [(1, true), (256, true), (257, false)] {
            let address = SocketAddr::from(([0, 0, 0, 0], port));
            let tried = cgroup::binds_with_reuseport(place.procs().as_fd(), address);
            assert_eq!(tried.unwrap(), forced, "{address}");
        }
    });
}

#[test]
fn a_trial_tells_why_it_can_not_be_made() {
    with(&[Need::Network], || {
        let place = Cgroup::new("trial");
        let taken = listening(V4.parse().unwrap());
        let error = cgroup::binds_with_reuseport(place.procs().as_fd(), taken.local_addr().unwrap());
        assert_eq!(error.unwrap_err().kind(), ErrorKind::AddrInUse);
        let null = File::open("/dev/null").unwrap();
        let error = cgroup::binds_with_reuseport(null.as_fd(), taken.local_addr().unwrap()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    });
}

#[test]
fn a_worker_begins_in_its_cgroup_which_can_be_removed_after_it() {
    with(&[Need::Network], || {
        let place = Cgroup::new("worker");
        let (procs, sh) = (place.procs(), PinnedExecutable::open(Path::new(SHELL)).unwrap());
        let around = || Around { cgroup: Some(procs.as_fd()), ..Around::default() };
        let name = place.0.file_name().unwrap().to_str().unwrap();
        let (told, _) = finish(start(&sh, &["sh", "-c", "cat /proc/self/cgroup"], &around()).unwrap());
        let line = told.lines().find_map(|line| line.strip_prefix("0::")).unwrap();
        assert_eq!(Path::new(line).file_name().unwrap(), name);
        let (child, _output) = start(&sh, &["sh", "-c", "exec sleep 600"], &around()).unwrap();
        assert_eq!(fs::remove_dir(&place.0).unwrap_err().kind(), ErrorKind::ResourceBusy);
        pidfd::send_signal(child.pidfd.as_fd(), libc::SIGKILL).unwrap();
        wait_for_end(child.pidfd.as_fd());
        wait_until("the cgroup to be empty", || fs::remove_dir(&place.0).is_ok());
    });
}
