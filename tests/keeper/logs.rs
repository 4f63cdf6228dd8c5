//! Pipes that workers print into, while there is no master to read them.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use reuseportd_sys::pipe;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Sleeper, hold, inherit, settle, socket_in, start};
use crate::support::PATIENCE;
use crate::support::world::world;

/// What a worker printed last is there for the next master, however much it printed while there was none.
#[test]
fn a_worker_that_prints_without_end_is_not_held_up_without_a_master() {
    world(&[], |world| {
        let socket = socket_in(world);
        let (reader, writer) = pipe::log_pipe().unwrap();
        let size = rustix::pipe::fcntl_getpipe_size(&reader).unwrap();
        let mut keeper = start(&socket);
        let worker = Sleeper::start();
        hold(&mut keeper, &[("log/1.0", reader.as_fd()), ("pidfd/1", worker.pidfd().as_fd())]);
        settle(&mut keeper);
        drop((keeper, reader));
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        for line in 0..u32::try_from(size / 4).unwrap() {
            assert!(can_write(&writer), "the pipe stays full");
            rustix::io::write(&writer, format!("{line:07}\n").as_bytes()).unwrap();
        }
        let mut inherited = inherit(&socket);
        let reader = File::from(inherited.fds.remove("log/1.0").unwrap());
        drop(writer);
        let text = read_all(reader);
        assert!((size / 4..=size).contains(&text.len()), "{} of {size} bytes", text.len());
        let last = format!("{:07}\n", size / 4 - 1);
        assert!(text.ends_with(last.as_bytes()), "the last line is not there");
        inherited.keeper.end();
    });
}

fn can_write(fd: &OwnedFd) -> bool {
    let patience = Timespec::try_from(PATIENCE).unwrap();
    poll(&mut [PollFd::new(fd, PollFlags::OUT)], Some(&patience)).unwrap() > 0
}

/// All that waits in a pipe that nobody writes into any more.
fn read_all(mut pipe: File) -> Vec<u8> {
    let mut text = Vec::new();
    pipe.read_to_end(&mut text).unwrap();
    text
}
