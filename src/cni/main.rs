//! The chained CNI plugin `crosslink`: see the library for what it does.

use std::{
    io::{Error, StdoutLock, Write},
    process::ExitCode,
};

use crosslink_kernel::{Kernel, System};

fn main() -> ExitCode {
    crosslink_cni::answer_panics();
    let env = crosslink_cni::Env::from_process();
    let open = || System::new().map(|system| Box::new(system) as Box<dyn Kernel>);
    let mut stdout = Stdout(std::io::stdout().lock());
    crosslink_cni::run(&env, &mut std::io::stdin().lock(), &mut stdout, &open)
}

/// Standard output that fails where there is none: the runtime would never see the result.
struct Stdout(StdoutLock<'static>);

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if crosslink_kernel::stdout_was_closed() {
            return Err(Error::other("it is closed"));
        }
        self.0.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}
