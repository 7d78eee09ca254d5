//! The `dinoxide` command. The only crate that reads arguments, prints, and exits.

mod allocator;
mod bench;
mod cache;
mod device;
mod embed;
mod eval;
mod export;
mod inspect;
mod memory;
mod plan;
mod recipes;
mod table;
mod terminal;
mod train;
mod viz;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use dinoxide_data::DataError;
use dinoxide_evaluation::EvaluationError;
use dinoxide_exchange::ExchangeError;
use dinoxide_onnx::OnnxError;

/// Train vision backbones by self-distillation (DINO, iBOT, DINOv2, DINOv3) on a plain folder of images.
#[derive(Parser)]
#[command(version, max_term_width = 110, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a recipe; without arguments, the quickstart on built-in images.
    Train(train::Args),
    /// Tell memory, speed, hours and disk of a run before it starts.
    Plan(plan::Args),
    /// Write a frozen teacher's tokens once, for students that then need no teacher.
    Cache(cache::Args),
    /// Measure what a trained backbone's features are worth.
    #[command(subcommand)]
    Eval(eval::Command),
    /// Write the features of images: CLS, mean, patch and register tokens, as safetensors.
    Embed(embed::Args),
    /// Draw what a backbone sees: components, attention, norms, neighbours, segmentation, depth.
    #[command(subcommand)]
    Viz(viz::Command),
    /// Show what weights hold: architecture, origin, parameters, whether they are whole.
    Inspect(inspect::Args),
    /// Write a backbone for another library: Hugging Face, the DINO repositories, timm, ONNX.
    Export(export::Args),
    /// Measure how fast this machine trains a recipe.
    #[command(subcommand)]
    Bench(bench::Command),
    /// List the recipes, or show one with every value and where it comes from.
    Recipes(recipes::Args),
}

/// The exit codes.
mod exit {
    pub(crate) const FAILURE: u8 = 1;
    pub(crate) const USAGE: u8 = 2;
    pub(crate) const INTERRUPTED: u8 = 130;
}

/// An error of the user's making: wrong arguments or configuration.
#[derive(Debug)]
struct Usage(anyhow::Error);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Usage {}

/// Whether what was asked for is at fault: wrong arguments or configuration, among them paths that lead nowhere.
fn is_usage(error: &anyhow::Error) -> bool {
    error.is::<Usage>()
        || error.downcast_ref::<DataError>().is_some_and(DataError::is_usage)
        || error.downcast_ref::<EvaluationError>().is_some_and(EvaluationError::is_usage)
        || error.downcast_ref::<ExchangeError>().is_some_and(ExchangeError::is_usage)
        || error.downcast_ref::<OnnxError>().is_some_and(OnnxError::is_usage)
}

/// A command whose options take numbers below 0 for values, and not for flags that it lacks: what is wrong with one then says
/// whoever knows its range.
fn taking_negative_numbers(command: clap::Command) -> clap::Command {
    command
        .mut_args(|arg| {
            let takes_values = arg.get_action().takes_values() && !arg.is_positional();
            arg.allow_negative_numbers(takes_values)
        })
        .mut_subcommands(taking_negative_numbers)
}

fn main() -> ExitCode {
    allocator::keep_freed_memory();
    let matches = taking_negative_numbers(Cli::command()).get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    // Parallel operations started from inside the pool need no waking of another thread and no waiting for it.
    let outcome = rayon::scope(|_| match cli.command {
        Command::Train(args) => train::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Cache(args) => cache::run(&args),
        Command::Eval(command) => eval::run(&command),
        Command::Embed(args) => embed::run(&args),
        Command::Viz(command) => viz::run(&command),
        Command::Inspect(args) => inspect::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Bench(command) => bench::run(&command),
        Command::Recipes(args) => recipes::run(&args),
    });
    match outcome {
        Ok(code) => code,
        Err(error) => {
            terminal::error(&error);
            ExitCode::from(if is_usage(&error) { exit::USAGE } else { exit::FAILURE })
        }
    }
}
