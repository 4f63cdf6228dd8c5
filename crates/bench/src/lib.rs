//! Load client that classifies the fate of every connection
