//! The chained CNI plugin `crosslink`: see the library for what it does.

use std::process::ExitCode;

use crosslink_kernel::{Kernel, System};

fn main() -> ExitCode {
    crosslink_cni::answer_panics();
    let env = crosslink_cni::Env::from_process();
    let open = || System::new().map(|system| Box::new(system) as Box<dyn Kernel>);
    crosslink_cni::run(&env, &mut std::io::stdin().lock(), &mut std::io::stdout().lock(), &open)
}
