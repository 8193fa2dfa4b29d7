"""Generated pictures with questions and answers: data to train and test a small MG-LLaVA."""
