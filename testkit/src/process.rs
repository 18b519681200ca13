//! A child process that is killed when its parent exits, even if the parent is killed with SIGKILL.

use std::{
    io::{self, BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A script that runs "$@", appends the command's output to the file $1, and prints the command's PID. It kills the
/// command when standard input is closed, which happens when the process that started the script exits. It uses
/// SIGKILL, because that also kills a frozen process.
const GUARD: &str = r#"
out=$1
shift
exec 3<&0 </dev/null
"$@" 3<&- >>"$out" 2>&1 &
child=$!
echo "$child"
{ read -r _ <&3; kill -KILL "$child"; } 2>/dev/null >/dev/null &
reader=$!
exec 3<&-
wait "$child"
status=$?
{ kill "$reader"; wait "$reader"; } 2>/dev/null
exit "$status"
"#;

/// A process that is killed when the value is dropped or the current process exits.
#[derive(Debug)]
pub struct Process {
    guard: Child,
    /// Closed when the value is dropped. The guard then kills the process.
    pipe: Option<ChildStdin>,
    pid: Pid,
}

impl Process {
    /// Starts the program in `command`, with the command's arguments, environment and working directory, and appends
    /// the program's output to `output`. Ctrl-C in the terminal does not reach the program.
    pub fn start(command: &Command, output: &Path) -> io::Result<Self> {
        let mut shell = Command::new("/bin/sh");
        shell
            .args(["-c", GUARD, "quota-guard"])
            .arg(output)
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            shell.current_dir(dir);
        }
        let mut guard = shell
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let pipe = guard.stdin.take();
        let mut line = String::new();
        let told = guard.stdout.take().map(BufReader::new);
        if let Some(mut told) = told {
            told.read_line(&mut line)?;
        }
        let pid = line.trim().parse().map_err(io::Error::other)?;
        Ok(Self {
            guard,
            pipe,
            pid: Pid::from_raw(pid),
        })
    }

    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends a signal. Does nothing if the process has already exited.
    pub fn signal(&mut self, signal: Signal) -> io::Result<()> {
        if self.ended()?.is_none() {
            kill(self.pid, signal)?;
        }
        Ok(())
    }

    /// Returns the exit status if the process has exited. If a signal killed the process, the status is 128 plus the
    /// signal's number.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.guard.try_wait()
    }

    /// Waits for the process to exit. Returns `None` if the process does not exit in time.
    pub async fn ends_within(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        loop {
            let ended = self.ended()?;
            if ended.is_some() || Instant::now() > deadline {
                return Ok(ended);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.pipe.take());
        let _ = self.guard.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn a_process_reports_its_exit_status_and_its_output() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let mut command = shell("echo \"$GREETING\"; exit 3");
        command.env("GREETING", "hello");
        let mut process = Process::start(&command, &out).unwrap();
        let status = process.ends_within(Duration::from_secs(10)).await.unwrap();
        assert_eq!(status.unwrap().code(), Some(3));
        assert_eq!(std::fs::read_to_string(out).unwrap(), "hello\n");
    }

    #[tokio::test]
    async fn the_process_ends_when_the_value_is_dropped() {
        let process = Process::start(&shell("exec sleep 60"), Path::new("/dev/null")).unwrap();
        let pid = process.pid();
        kill(pid, None).expect("the process is running");
        drop(process);
        assert!(kill(pid, None).is_err(), "the process still runs");
    }

    #[tokio::test]
    async fn a_signal_reaches_the_process_itself() {
        let mut process = Process::start(&shell("exec sleep 60"), Path::new("/dev/null")).unwrap();
        process.signal(Signal::SIGTERM).unwrap();
        let status = process.ends_within(Duration::from_secs(10)).await.unwrap();
        assert_eq!(
            status.unwrap().code(),
            Some(128 + 15),
            "SIGTERM has number 15"
        );
    }
}
